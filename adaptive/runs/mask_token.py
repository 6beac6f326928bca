"""The token that stands for hidden ones, of objectives that hide tokens."""

import dataclasses

from adaptive.data.tokenizers import Tokenizer, load_tokenizer
from adaptive.errors import RecipeError
from adaptive.objectives import Denoising, masked_diffusion
from adaptive.recipe import Recipe


def with_mask(recipe: Recipe) -> Recipe:
    """The recipe with the id of its mask token: that of its tokenizer or, where that has none, the first id behind the
    tokenizer's, if the model has one. Others are returned as they are.

    Raises RecipeError where there is none, with what would work.
    """
    aim = recipe.objective
    if not isinstance(aim, masked_diffusion.Settings) or aim.mask_id >= 0:
        return recipe
    tokenizer = load_tokenizer(recipe.data.tokenizer, bos=recipe.data.bos, eos=recipe.data.eos)
    found = tokenizer.vocab_size if tokenizer.mask_id is None else tokenizer.mask_id
    if tokenizer.mask_id is None and found >= recipe.model.vocab_size:
        raise RecipeError(
            f"objective={aim.kind()} needs a token for what is hidden, and the tokenizer {tokenizer.name} has none: "
            f"set model.vocab_size={found + 1} or more, for an id behind its {found:,}, or objective.mask_id to one "
            "that stands for no text"
        )
    recipe = dataclasses.replace(recipe, objective=dataclasses.replace(aim, mask_id=found))
    recipe.objective.check(recipe.model.vocab_size)
    return recipe


def check_mask(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raises RecipeError for a mask token that texts have."""
    told = recipe.objective.denoising()
    if told is None:
        return
    if not tokenizer.is_special(told.mask_id) or told.mask_id in tokenizer.borders:
        own = "" if tokenizer.mask_id is None else f", such as its own, {tokenizer.mask_id}"
        raise RecipeError(
            f"objective.mask_id={told.mask_id}: texts of the tokenizer {tokenizer.name} have "
            f"{tokenizer.describe(told.mask_id)}; choose an id that stands for no text{own}"
        )


def denoising_of(recipe: Recipe) -> Denoising:
    """How the model of a run decodes by filling in hidden tokens.

    Raises RecipeError for one that was trained to predict the next token.
    """
    told = with_mask(recipe).objective.denoising()
    if told is None:
        raise RecipeError(
            f"{recipe.name} was trained with objective={recipe.objective.kind()} and fills in no hidden tokens: it "
            "continues texts token by token (adaptive generate); a diffusion model is trained with "
            "objective=masked_diffusion or block_diffusion"
        )
    return told
