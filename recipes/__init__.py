"""One file per recipe, each with a function `recipe() -> Recipe`. `--list_recipes` of any command shows all."""
