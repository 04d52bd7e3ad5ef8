import dataclasses
import json
import math
import resource
import sys
from fractions import Fraction

import pytest
from transformers import HfArgumentParser

from amp_hf import AMPConfig
from amp_hf.radius import START

NAN, INF = float("nan"), float("inf")
HUGE, TINY = 10**400, Fraction(1, 10**400)  # no float is near the first, and 0 is near the second

# Every field: what it accepts as its errors say it, values of that kind, and values that are not.
FIELDS = {
    "epsilon": ("None or a finite number >= 0", [None, 0, 0.5, 3], [-0.1, NAN, INF, True, "0.1"]),
    "rise": ("a finite number > 0", [0.05, 1], [0, -0.1, NAN, INF, True, "0.1", None]),
    "inner_lr": ("a finite number > 0", [1, 0.2], [0, 0.0, -1.0, NAN, INF, True, "1", None]),
    "inner_steps": ("an integer >= 1", [1, 3], [0, -1, 1.0, 1.5, NAN, INF, True, "1", None]),
    "ball": (
        "one of 'global', 'tensor', 'elementwise'",
        ["global", "tensor", "elementwise"],
        ["cube", "", None, 1],
    ),
    "scope": (
        "one of None, 'micro_batch', 'batch'",
        [None, "micro_batch", "batch"],
        ["device", "", "None", True],
    ),
    "ascent_start": ("a number in [0, 1)", [0, 0.999], [-0.1, 1, 1.0, 70, NAN, INF, False, "0.7"]),
    "ascent_every": ("an integer >= 1", [1, 10], [0, -2, 2.0, NAN, True, "2", None]),
    "ascent_fraction": ("a number in (0, 1]", [0.25, 1], [0, 0.0, -0.5, 1.1, NAN, INF, True, "1"]),
    "perturb": (
        "'all', 'norm' or a regular expression on parameter names",
        ["all", "norm", r"layer\.[0-3]\."],
        ["", "(", "*", None, 3, True],
    ),
    "norm_stats": ("one of 'clean', 'both'", ["clean", "both"], ["outer", "", None, True]),
    "ascent_reuse": ("True or False", [True, False], [1, 0, "true", None]),
}
UNUSUAL = AMPConfig(
    epsilon=0.25,
    rise=0.05,
    inner_lr=0.5,
    inner_steps=2,
    ball="tensor",
    scope="batch",
    ascent_start=0.5,
    ascent_every=3,
    ascent_fraction=0.75,
    perturb=r"conv\d+\.weight",
    norm_stats="both",
    ascent_reuse=True,
)


def cases(values):
    return [(name, value) for name, field in FIELDS.items() for value in field[values]]


def ascents(max_steps, **kwargs):
    config = AMPConfig(**kwargs | {"ascent_reuse": False})
    return [step for step in range(max_steps) if config.perturbs_at(step, max_steps)]


def test_the_defaults_are_valid_and_every_field_is_tested_here():
    assert AMPConfig().to_dict().keys() == FIELDS.keys()
    differing = [name for name in FIELDS if getattr(UNUSUAL, name) != getattr(AMPConfig(), name)]
    assert differing == list(FIELDS)


@pytest.mark.parametrize(("name", "value"), cases(1))
def test_every_good_value_is_kept(name, value):
    assert getattr(AMPConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), cases(2))
def test_every_bad_value_raises_an_error_naming_the_field_and_what_it_accepts(name, value):
    with pytest.raises(ValueError) as caught:
        AMPConfig(**{name: value})
    expected = f"AMPConfig.{name} must be {FIELDS[name][0]}, got {value!r}."
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("name", ["epsilon", "rise", "inner_lr", "ascent_start", "ascent_fraction"])
def test_a_number_is_checked_as_the_float_that_it_becomes(name):
    bad = {
        "epsilon": [HUGE, -HUGE],
        "rise": [HUGE, TINY],
        "inner_lr": [HUGE, TINY],
        "ascent_start": [HUGE, 1 - TINY],
        "ascent_fraction": [HUGE, TINY],
    }
    for value in bad[name]:
        with pytest.raises(ValueError, match=rf"^AMPConfig\.{name} must be ") as caught:
            AMPConfig(**{name: value})
        assert str(caught.value).endswith(f"got {value!r}.")


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_that_python_does_not_print_is_refused_by_the_name_of_its_field(name):
    nested = []
    for _ in range(10**5):
        nested = [nested]
    for value, kind in ((-(10**5000), "int"), (nested, "list")):
        with pytest.raises(
            ValueError, match=rf"^AMPConfig\.{name} must be .*, got a {kind} that is too large"
        ):
            AMPConfig(**{name: value})


@pytest.mark.parametrize("pattern", ["(" * 9999 + ")" * 9999, "a{99999999999}"], ids=len)
def test_a_regular_expression_that_python_cannot_compile_is_refused(pattern):
    with pytest.raises(ValueError, match=r"^AMPConfig\.perturb must be "):
        AMPConfig(perturb=pattern)


def test_a_broken_regular_expression_is_explained():
    with pytest.raises(ValueError, match=r"got 'a\('\. \(missing \), unterminated subpattern"):
        AMPConfig(perturb="a(")


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AMPConfig().epsilon = 0.5


def test_a_config_comes_back_from_a_dict_and_from_json_equal_to_itself(tmp_path):
    for config in (AMPConfig(), UNUSUAL):
        assert AMPConfig(**config.to_dict()) == config
        assert AMPConfig(**json.loads(json.dumps(config.to_dict()))) == config
        config.to_json_file(tmp_path / "amp_config.json")
        assert AMPConfig.from_json_file(tmp_path / "amp_config.json") == config


def test_a_config_that_cannot_be_written_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "amp_config.json"
    UNUSUAL.to_json_file(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as on a disk that is full
    try:
        with pytest.raises(OSError):
            AMPConfig().to_json_file(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert AMPConfig.from_json_file(path) == UNUSUAL
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_file_that_is_no_json_object_is_named(tmp_path, text):
    path = tmp_path / "amp_config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"amp_config\.json cannot be read as a JSON object"):
        AMPConfig.from_json_file(path)
    assert AMPConfig().changes_since(path) == [f"{path} cannot be read as a JSON object"]


def test_a_field_of_a_file_that_no_config_has_is_named(tmp_path):
    path = tmp_path / "amp_config.json"
    path.write_text('{"epsilon": 0.1, "rho": 0.05}')
    with pytest.raises(ValueError, match=r"that AMPConfig does not have: \['rho'\]\.$"):
        AMPConfig.from_json_file(path)


@pytest.mark.parametrize("text", ["[" * 10**6, f'{{"epsilon": 1{"0" * 5000}}}'], ids=len)
def test_a_file_that_python_cannot_read_as_json_is_named(tmp_path, text):
    path = tmp_path / "amp_config.json"
    path.write_text(text)
    assert AMPConfig().changes_since(path) == [f"{path} cannot be read as a JSON object"]


def test_a_file_with_a_value_nested_as_deep_as_python_reads_it_is_refused(tmp_path):
    path = tmp_path / "amp_config.json"
    for depth in range(1, sys.getrecursionlimit() + 20):
        path.write_text(f'{{"epsilon": {"[" * depth}{"]" * depth}}}')
        (message,) = AMPConfig().changes_since(path)
        assert (
            "must be None or a finite number >= 0" in message
            or "cannot be read as a JSON object" in message
        )


def test_a_command_line_sets_every_field():
    parser = HfArgumentParser(AMPConfig)
    line = [word for name, value in UNUSUAL.to_dict().items() for word in (f"--{name}", str(value))]
    assert parser.parse_args_into_dataclasses(line) == (UNUSUAL,)
    assert parser.parse_args_into_dataclasses([]) == (AMPConfig(),)


def test_every_field_is_explained_on_the_command_line():
    assert all(field.metadata["help"] for field in dataclasses.fields(AMPConfig))


@pytest.mark.parametrize("start", ["0", "0.1", "0.29", "0.5", "0.7", "0.99", "0.9999999"])
def test_the_first_floor_of_ascent_start_times_max_steps_steps_are_plain(start):
    for max_steps in [*range(1, 120), 1000]:
        plain = int(Fraction(start) * max_steps)
        assert ascents(max_steps, ascent_start=float(start)) == list(range(plain, max_steps))


@pytest.mark.parametrize("start", [0.9, 0.999999, 0.99999999, 1 - 2**-53])
@pytest.mark.parametrize("every", [1, 1000])
def test_at_least_one_step_is_perturbed_however_late_the_start(start, every):
    for max_steps in (1, 2, 10, 150):
        assert ascents(max_steps, ascent_start=start, ascent_every=every)


def test_from_the_start_on_every_kth_step_is_perturbed():
    assert ascents(20, ascent_start=0.5, ascent_every=3) == [10, 13, 16, 19]
    assert ascents(7, ascent_every=2) == [0, 2, 4, 6]


def test_with_reuse_all_steps_from_the_start_on_are_perturbed():
    config = AMPConfig(ascent_start=0.5, ascent_every=3, ascent_reuse=True)
    assert [step for step in range(20) if config.perturbs_at(step, 20)] == list(range(10, 20))


@pytest.mark.parametrize("reuse", [False, True])
def test_radius_zero_never_perturbs(reuse):
    config = AMPConfig(epsilon=0, ascent_reuse=reuse)
    assert not any(config.perturbs_at(step, 10) for step in range(10))


@pytest.mark.parametrize(
    "budget", [1.01, 1.05, 1.1, 1.15, 1.2, 1.24, 1.28, 1.3, 1.5, 1.55, 1.6, 1.9, 2, 3]
)
def test_a_budget_is_spent_on_ascents_and_not_overdrawn(budget):
    config = AMPConfig.for_budget(budget)
    passes = 1 + len(ascents(10_000, **config.to_dict())) / 10_000
    assert passes == pytest.approx(min(budget, 1.3), abs=1e-3)
    for steps in (10, 30, 50, 110):  # not a whole pass more than that
        assert len(ascents(steps, **config.to_dict())) < (min(budget, 1.3) - 1) * steps + 1
    perturbed = sum(config.perturbs_at(step, 10_000) for step in range(10_000)) / 10_000
    least = 0.475 if 1.2 < budget < 1.3 else 0.55  # where no whole k comes nearer to 60 %
    assert perturbed >= min(least, 5.99 * (budget - 1))
    assert config.ascent_start >= START  # earlier ones would not be made, and so not spent
    assert config.ascent_every <= 6


def test_the_smallest_budget_buys_an_ascent():
    assert len(ascents(100, **AMPConfig.for_budget(math.nextafter(1, 2)).to_dict())) == 1


def test_the_settings_of_the_budget_that_is_recommended():
    assert AMPConfig.for_budget(1.15) == AMPConfig(
        ascent_start=0.4, ascent_every=4, ascent_reuse=True
    )
    assert AMPConfig.for_budget(2) == AMPConfig.for_budget(1.3)


@pytest.mark.parametrize("budget", [1, 1.0, 0.5, 0, -1, NAN, INF, True, "1.15", None])
def test_a_budget_that_buys_no_ascent_is_refused(budget):
    with pytest.raises(ValueError) as caught:
        AMPConfig.for_budget(budget)
    assert f"takes a finite number > 1, times the stock Trainer's passes, got {budget!r}." in (
        str(caught.value)
    )


@pytest.mark.parametrize("budget", [HUGE, 1 + TINY, 10**5000], ids=["huge", "tiny", "unprintable"])
def test_a_budget_is_checked_as_the_float_that_it_becomes(budget):
    with pytest.raises(ValueError, match=r"takes a finite number > 1, "):
        AMPConfig.for_budget(budget)
