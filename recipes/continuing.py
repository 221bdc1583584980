"""How training goes on from a model (`tessera fit --from`): with its sizes, gentler rates and fewer passes."""

from recipes.origin import Base, Origin
from recipes.plan_sizes import DVAE_ROWS, PRIOR_ROWS, DataFacts, Machine, Sizes, batch_for, prior_fits

# What a stage that starts from a model's weights learns at, as a share of the rate for new weights, and for how many
# passes at most. Measured on few recolored scenes (benchmarks/results/finetuning.json): the loss on held-out pictures
# is best after few passes, but pictures that are drawn show what was asked for most often after forty.
CONTINUED_RATE = 0.3
MOST_CONTINUED_EPOCHS = 40
LEAST_CONTINUED_STEPS = 100


def starts_from(origin: Origin | None, stage: str) -> str | None:
    """The model folder whose weights a stage starts from; None for new weights, and for a dVAE that is frozen."""
    if origin is None or stage not in origin.parts or (stage == "dvae" and not origin.train_dvae):
        return None
    return origin.path


def learns_anew(origin: Origin | None, stage: str) -> bool:
    """Whether a stage has as much to learn as with new weights, such as a prior whose codes come to mean others."""
    if origin is None or stage not in origin.parts:
        return True
    return origin.train_dvae and stage != "scorer"


def continued_sizes(base: Base, facts: DataFacts, machine: Machine) -> Sizes:
    """The sizes of a model to go on from, and the rows next to them, with smaller batches where memory is short."""
    vae_row = next((row for row in reversed(DVAE_ROWS) if row.widths[0] <= base.vae.widths[0]), DVAE_ROWS[0])
    prior_row = next((row for row in reversed(PRIOR_ROWS) if row.dim <= base.prior.dim), PRIOR_ROWS[0])
    batch_size = batch_for(prior_row.batch_size, facts)
    while batch_size > 1 and not prior_fits(base.prior, batch_size, machine):
        batch_size //= 2
    return Sizes(base.vae, vae_row, base.prior, prior_row._replace(batch_size=batch_size))
