"""The handler cannot be imported."""

import a_package_that_is_not_installed


def handle(event, context):
    return a_package_that_is_not_installed.answer
