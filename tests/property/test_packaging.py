"""What of a source goes into an image, whatever its files are called."""

import contextlib

from hypothesis import example, given, strategies as st

from adapter.errors import AdapterError, ConfigError
from adapter.packaging.sources import WeightsConfig, source_identity
from adapter.packaging.weights_layer import choose
from adapter.packaging.weights_source import is_safe

SUFFIXES = [".safetensors", ".bin", ".pt", ".gguf", ".json", ".index.json", ".py", ".pkl", ".txt", ".onnx", ""]
NAMES = st.builds(
    lambda folder, stem, suffix: f"{folder}{stem}{suffix}",
    st.sampled_from(["", "vae/", "a/b/"]),
    st.sampled_from(["model", "pytorch_model", "config", "LICENSE", "x"]),
    st.sampled_from(SUFFIXES),
)
SOURCES = st.lists(NAMES, unique=True, max_size=12)
READS_AS_CODE = (".bin", ".pt", ".pkl", ".py")


@given(SOURCES, st.sampled_from(["keep", "float16"]), st.booleans())
def test_each_file_has_one_use_and_none_is_lost(names, dtype, asked):
    with contextlib.suppress(AdapterError):
        choice = choose(names, dtype=dtype, asked=asked)
        used = [*filter(None, [choice.checkpoint]), *choice.beside, *choice.left_out]
        assert sorted(used) == sorted(names)


@given(SOURCES, st.sampled_from(["keep", "float16"]), st.booleans())
def test_nothing_that_is_read_by_running_it_lies_beside_the_weights(names, dtype, asked):
    with contextlib.suppress(AdapterError):
        choice = choose(names, dtype=dtype, asked=asked)
        assert not any(name.endswith(READS_AS_CODE) for name in choice.beside)
        assert "model.safetensors" not in choice.beside or choice.checkpoint is None


@example(["pytorch_model.safetensors", "pytorch_model.bin"])
@given(SOURCES)
def test_a_source_with_a_safetensors_file_is_never_read_otherwise(names):
    if any("/" not in name and name.endswith(".safetensors") for name in names):
        checkpoint = choose(names, dtype="keep").checkpoint
        assert checkpoint is None or "safetensors" in checkpoint


@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "", "a", "/", "\0", "a b", "~"])).map("/".join))
def test_a_safe_name_stays_in_its_folder_and_on_its_line(name):
    if is_safe(name):
        parts = name.split("/")
        assert not set(parts) & {"", ".", ".."}
        assert name.isprintable()
        assert not name.startswith(("/", "~"))


@given(
    st.text(max_size=60)
    | st.sampled_from(["hf://", "oci://", "https://", "./"]).flatmap(lambda s: st.text(max_size=30).map(s.__add__))
)
def test_any_text_is_a_source_or_a_configuration_error(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    try:
        source_identity(WeightsConfig(text), folder)
    except ConfigError as error:
        assert error.hint
    except AdapterError as error:
        assert text.startswith("./"), error
