"""Commands of pip name places, siblings and what a shell must not change."""

from dilated_factory.errors import missing_package
from dilated_factory.installing import how_to_install, install_command


def test_a_command_names_the_siblings_that_a_package_requires() -> None:
    assert install_command("dilated-pool") == "pip install packages/dilated-pool"
    both = "packages/dilated-core packages/dilated-ring packages/dilated-sparse"
    assert install_command("dilated-sparse", "dilated-ring") == f"pip install {both}"


def test_what_a_shell_would_change_is_quoted() -> None:
    told = install_command("dilated-factory[ring]", "dilated-ring")
    places = 'packages/dilated-core packages/dilated-ring "packages/dilated-factory[ring]"'
    assert told == f"pip install {places}"


def test_a_url_names_each_package_and_its_folder() -> None:
    assert install_command("dilated-ring", url="URL") == (
        'pip install "dilated-core @ git+URL#subdirectory=packages/dilated-core"'
        ' "dilated-ring @ git+URL#subdirectory=packages/dilated-ring"'
    )


def test_packages_of_others_come_from_the_index() -> None:
    assert how_to_install("transformers") == "pip install transformers"
    assert str(missing_package("this", "transformers")) == (
        "this needs transformers, which is not installed: pip install transformers"
    )


def test_an_error_says_where_its_command_works() -> None:
    assert str(missing_package("this", "dilated-ring")) == (
        "this needs dilated-ring, which is not installed: in a clone of the project, "
        "pip install packages/dilated-core packages/dilated-ring"
    )
