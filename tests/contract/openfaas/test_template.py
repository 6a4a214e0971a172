"""The context that docker gets, as faas-cli was seen to make it. See tests/e2e/test_faas_cli_template.py."""

import os

from tests.contract.openfaas.template import listing, recorded, write_function
from tests.images.template import shrink_wrapped


def test_what_the_image_tests_build_from_is_what_faas_cli_makes(repository, tmp_path):
    function = write_function(tmp_path / "fn")
    context = shrink_wrapped(repository / "template" / "python3-gpu", function, tmp_path / "context")
    assert [name for name in listing(context) if not name.endswith(".whl")] == recorded()


def test_the_link_that_faas_cli_looks_for_leads_to_folders_only(repository):
    assert os.path.islink(repository / "template")
    assert all((path / "template.yml").is_file() for path in (repository / "template").iterdir())
