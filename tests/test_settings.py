"""Settings: every field refuses what it cannot mean, in one line; what may change between starts of a run."""

import math

import pytest
from conftest import ROOT, small_config, small_settings

from jitjax import settings
from jitjax.cli import arguments
from jitjax.config import default_config
from jitjax.errors import UserError
from jitjax.geometry import geometry_of

ABSURD = [
    "nan",
    "inf",
    "-inf",
    "1e30",
    "-1e30",
    "2147483648000000",
    "-1",
    "abc",
    "",
    "()",
    "(1,2,3)",
    "[None]",
    "{}",
    "0x",
    "True",
]


@pytest.mark.parametrize("name", settings.fields())
def test_every_field_takes_its_default_and_refuses_absurd_values_in_one_line(name):
    field = settings.fields()[name]
    assert field.check(field.default) == field.default
    assert field.rule.help
    refused = 0
    for text in ABSURD:
        try:
            value = field.parse(text)
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"--config.{name}={text}") and "must be" in str(error) and "\n" not in str(error)
        else:  # what is taken is finite and of the field's type
            assert type(value) is field.type
            for number in value if field.type is tuple else [value] if field.type in (int, float) else []:
                assert math.isfinite(number) and field.rule.low <= number <= field.rule.high
    assert refused >= (0 if field.type is str and not field.rule.choices else 8)


def test_the_config_dict_has_every_field_and_nothing_else():
    config = default_config()
    assert settings.from_mapping(config) == settings.Settings()
    assert dict(settings.flatten(settings.to_dict(settings.Settings()))).keys() == settings.fields().keys()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("preview__interval", (0.9, 0.1), r"--config.preview.interval=\(0.9,0.1\): the first time must be smaller"),
        ("preview__which", "0.7", r"not among the run's EMAs 0.9, 0.5"),
        ("optim__ema_decays", (0.9, 0.9), r"0.9 stands twice"),
        ("optim__power_emas", (0.1, 0.05, 0.1), r"power:0.1 stands twice"),
        ("epochs", 3.0, r"exactly one run length"),
        ("total_steps", None, r"exactly one run length.*none is set"),
    ],
)
def test_contradictions_between_fields(name, value, message):
    with pytest.raises(UserError, match=message):
        settings.check(small_settings(**{name: value}))


def test_two_data_sets_or_none_are_refused():
    with pytest.raises(UserError, match="are both set"):
        settings.check_data(settings.Data(path="a", synthetic="shapes"))
    with pytest.raises(UserError, match=r"--config.data.path is missing"):
        settings.check_data(settings.Data())


def test_unknown_fields_are_named_with_the_nearest():
    config = small_config()
    with config.unlocked():
        config.optim.lrr = 1.0
    with pytest.raises(UserError, match=r"no field optim.lrr: did you mean optim.lr\?"):
        settings.from_mapping(config)
    assert settings.from_mapping(config, ignore_unknown=True) == small_settings()


def test_what_may_change_between_starts():
    """The run length while the rate is constant, how the effective batch is cut, and everything about speed and logging."""
    old = settings.to_dict(small_settings(total_steps=10))
    assert settings.differing_fields(old, small_settings(total_steps=20)) == []
    assert settings.differing_fields(old, small_settings(total_steps=None, epochs=2.0)) == []
    assert settings.differing_fields(old, small_settings(total_steps=10, batch_size=1, optim__accumulation_steps=2)) == []
    assert settings.differing_fields(old, small_settings(total_steps=10, kernels="plain", log__every_steps=7)) == []
    assert settings.differing_fields(old, small_settings(total_steps=10, seed=1)) == ["seed: 0 -> 1"]
    del old["optim"]["ema_warmup"]  # saved by a version without it
    warm = small_settings(total_steps=10, optim__ema_warmup=True)
    assert settings.differing_fields(old, warm) == ["optim.ema_warmup: False -> True"]
    cosine = settings.to_dict(small_settings(total_steps=10, optim__schedule="cosine"))
    longer = small_settings(total_steps=20, optim__schedule="cosine")
    assert settings.differing_fields(cosine, longer) == ["total_steps: 10 -> 20"]


def test_the_reference_page_is_that_of_the_fields():
    assert (ROOT / "docs/settings.md").read_text() == settings.reference_page() + "\n"


# What once trained into NaN, ended in a traceback, or took minutes to fail.
EXTREMES = """
model.mlp_ratio=-inf,nan,inf,0,-1,1e-9 model.context_length=99999999999999999999
model.depth=1000,2147483648,99999999999999999999 data.image_size=2147483648,99999999999999999999
model.bottleneck=99999999999999999999,0,-3 model.width=2147483648,0 optim.warmup_steps=2147483648,99999999999999999999,1e18
preview.every_epochs=inf seed=99999999999999999999,1e30 epochs=nan,inf total_images=nan total_tokens=inf total_steps=1e30
data.num_workers=2147483648,99999999999999999999 optim.b1=nan,inf,1,-1,3.7e5,0.99999999 optim.b2=nan,inf,1,7,0.99999999
optim.lr=inf optim.weight_decay=inf optim.eps=inf,0,1e-37 optim.power_emas=1e-170 diffusion.noise_scale=inf,1e30
diffusion.p_mean=nan,inf diffusion.p_std=inf diffusion.t_eps=inf preview.cfg_scale=nan,inf preview.t_eps=1.5,inf
preview.interval=(2,1)
""".split()


@pytest.mark.parametrize("field", EXTREMES)
def test_extremes_are_refused_in_one_line_before_anything_begins(field, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, _, values = field.partition("=")
    for value in [values] if values.startswith("(") else values.split(","):
        with pytest.raises(UserError) as error:
            s = arguments.load(["--config=configs/quickstart.py", f"--config.{name}={value}"]).settings
            geometry_of(s.model, s.data.image_size, 8)
        assert "\n" not in str(error.value) and name in str(error.value)
