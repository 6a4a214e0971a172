from adapter.cli.up import deploy_words


def test_a_stack_file_is_named_so_that_no_other_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "my functions" / "embed"
    folder.mkdir(parents=True)
    assert deploy_words("embed", folder) == "--image embed --name embed"
    (folder / "stack.yaml").touch()
    assert deploy_words("embed", folder) == f"-f '{folder}/stack.yaml'"
    monkeypatch.chdir(tmp_path)
    assert deploy_words("embed", folder) == "-f 'my functions/embed/stack.yaml'"
    monkeypatch.chdir(folder)
    assert deploy_words("embed", folder) == "-f stack.yaml"
