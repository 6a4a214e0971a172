import stat

from adapter.openfaas.auth import ensure_credentials


def test_a_password_is_made_once_and_is_private(state_dir):
    user, password = ensure_credentials(state_dir)
    assert user == "admin"
    assert len(password) >= 32
    assert ensure_credentials(state_dir) == (user, password)
    for name in ("basic-auth-user", "basic-auth-password"):
        assert stat.S_IMODE((state_dir / name).stat().st_mode) == 0o600


def test_a_password_of_one_s_own_is_kept(state_dir):
    (state_dir / "basic-auth-user").write_text("me\n")
    (state_dir / "basic-auth-password").write_text("mine\n")
    assert ensure_credentials(state_dir) == ("me", "mine")


def test_an_empty_password_is_replaced(state_dir):
    (state_dir / "basic-auth-password").write_text("\n")  # a crash between creating and writing
    assert len(ensure_credentials(state_dir)[1]) >= 32
