"""How the train images are split."""

import numpy as np

from fmbench.errors import UserError


def split(
    labels: np.ndarray,
    name: str,
    *,
    test_size: float = 0.2,
    random_state: int = 0,
    num_folds: int = 5,
    fold: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits the train images into those to train on and those to choose by.

    Args:
      labels: the train labels (n,).
      name: 'default' keeps n // 12 rows (5,000 of the real data) for validation, as large a part
        of each class, and always the same; 'train_test_split' is scikit-learn's function of that name,
        as others' experiments call it; 'kfold' keeps one fold of scikit-learn's shuffled `KFold`;
        'all' keeps nothing for validation.
      test_size: as in scikit-learn, for 'train_test_split' only.
      random_state: as in scikit-learn, for 'train_test_split' and 'kfold'.
      num_folds: as in scikit-learn, for 'kfold' only.
      fold: which of them is kept for validation, from 0.

    Returns:
      Train and validation rows, int32, in the order scikit-learn gives them.

    Raises:
      UserError: unknown name, a `test_size` or `num_folds` scikit-learn refuses, no such fold, or for
        'default' too few images.
    """
    rows = np.arange(len(labels), dtype=np.int32)
    if name == "all":
        return rows, rows[:0]
    from sklearn.model_selection import KFold, train_test_split  # takes a second to import

    if name == "default":
        try:
            train, validation = train_test_split(rows, test_size=len(rows) // 12, stratify=labels, random_state=0)
        except ValueError as error:
            raise UserError(
                f"config.data.split=default cannot split {len(rows)} train images: {error} Give "
                "--config.data.split=all or train_test_split."
            ) from error
    elif name == "train_test_split":
        try:
            train, validation = train_test_split(rows, test_size=test_size, random_state=random_state)
        except ValueError as error:
            raise UserError(f"train_test_split refuses test_size={test_size}: {error}") from error
    elif name == "kfold":
        if not 0 <= fold < num_folds:
            raise UserError(f"There is no fold {fold} of {num_folds} folds; they are numbered from 0.")
        try:
            folds = KFold(num_folds, shuffle=True, random_state=random_state).split(rows)
            train, validation = list(folds)[fold]
        except ValueError as error:
            raise UserError(f"KFold refuses num_folds={num_folds}: {error}") from error
        train, validation = train.astype(np.int32), validation.astype(np.int32)
    else:
        raise UserError(
            f"Unknown split {name!r}. The splits are 'default', 'train_test_split', 'kfold' and 'all'."
        )
    return train, validation
