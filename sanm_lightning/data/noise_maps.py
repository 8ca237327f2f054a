"""Class-to-class maps of asymmetric noise for CIFAR-10 and CIFAR-100."""

from collections.abc import Callable

__all__ = [
    "CIFAR10_MAP",
    "CIFAR100_SUPERCLASSES",
    "MAPS",
    "cifar100_blocks_of_five_map",
    "cifar100_superclass_map",
    "class_map",
]

# truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse (Patrini et al., CVPR 2017).
CIFAR10_MAP: dict[int, int] = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}

# Fine classes of each superclass (Krizhevsky, 2009). Fine ids are the alphabetical ranks of these names, so the
# classes of one superclass are NOT five consecutive ids.
CIFAR100_SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}


def cifar100_superclass_map() -> dict[int, int]:
    """Return a map from each class to the next class of its CIFAR-100 superclass, cyclic and ordered by fine id.

    Returns:
        A map of all 100 fine ids to another fine id of the same superclass.
    """
    fine_id = {name: i for i, name in enumerate(sorted(n for names in CIFAR100_SUPERCLASSES.values() for n in names))}
    mapping: dict[int, int] = {}
    for names in CIFAR100_SUPERCLASSES.values():
        members = sorted(fine_id[name] for name in names)
        mapping.update(zip(members, members[1:] + members[:1], strict=True))
    return mapping


def cifar100_blocks_of_five_map() -> dict[int, int]:
    """Return a map from each class to the next of its block of five consecutive CIFAR-100 ids, cyclic.

    Source: the released codes of ELR and CDR. The ids are alphabetical, so the blocks are not the superclasses.
    """
    return {label: 5 * (label // 5) + (label + 1) % 5 for label in range(100)}


MAPS: dict[str, Callable[[], dict[int, int]]] = {
    "cifar10": lambda: dict(CIFAR10_MAP),
    "cifar100_blocks_of_five": cifar100_blocks_of_five_map,
    "cifar100_superclass": cifar100_superclass_map,
}


def class_map(name: str) -> dict[int, int]:
    """Return the class-to-class map ``cifar10``, ``cifar100_superclass`` or ``cifar100_blocks_of_five``.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in MAPS:
        raise ValueError(
            f"expected a noise mapping among {sorted(MAPS)}, got {name!r}; choose one of them, or use a map of class "
            "ids"
        )
    return MAPS[name]()
