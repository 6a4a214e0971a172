import pytest

from adapter.policy.gpu_models import matches

GI = 2**30
MI = 2**20


@pytest.mark.parametrize(
    ("wanted", "model"),
    [
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("A100", "NVIDIA-A100-SXM4-80GB"),
        ("A100-80GB", "NVIDIA-A100-SXM4-80GB"),
        ("a100 80g", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA-A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"),
        ("nvidia-tesla-t4", "Tesla-T4"),
        ("Tesla T4", "nvidia-tesla-t4"),
        ("T4", "t4"),
        ("rtx-4090", "NVIDIA GeForce RTX 4090"),
        ("RTX4090", "NVIDIA GeForce RTX 4090"),
        ("mi300x", "AMD_Instinct_MI300X_OAM"),
        ("nvidia", "NVIDIA L4"),
    ],
)
def test_names_that_mean_one_model(wanted, model):
    assert matches(wanted, model)


@pytest.mark.parametrize(
    ("wanted", "model"),
    [
        ("a10", "NVIDIA A100-SXM4-80GB"),
        ("a10", "NVIDIA-A10G"),
        ("a100-40gb", "NVIDIA A100-SXM4-80GB"),
        ("l40", "NVIDIA L40S"),
        ("quadro rtx 6000", "NVIDIA RTX 6000 Ada Generation"),
        ("h100", ""),
    ],
)
def test_names_that_do_not(wanted, model):
    assert not matches(wanted, model)


@pytest.mark.parametrize(
    ("wanted", "model", "mebibytes", "expected"),
    [
        ("a100-80gb", "a100", 81920, True),
        ("a100-80gb", "a100", 40536, False),
        ("a100-80gb", "a100", 0, False),
        ("t4-16gb", "Tesla-T4", 15360, True),
        ("l4-24gb", "NVIDIA-L4", 23034, True),
        ("a100-40gb", "NVIDIA-A100-SXM4-80GB", 40960, False),
        ("h100-80gb", "a100", 81920, False),
    ],
)
def test_known_memory_speaks_where_a_name_says_none(wanted, model, mebibytes, expected):
    assert matches(wanted, model, mebibytes * MI) is expected
