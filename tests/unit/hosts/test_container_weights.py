"""What a container host says to a replica leaves to the image what only the image knows."""

from adapter.hosts.container import _said
from adapter.replica import ReplicaSettings


def test_the_weights_of_an_image_are_the_images_to_name():
    said = _said(ReplicaSettings())
    assert "GPUFN_FUNCTION" in said
    assert not {"GPUFN_WEIGHTS", "GPUFN_VERIFY_WEIGHTS", "GPUFN_FOLDER"} & said.keys()
