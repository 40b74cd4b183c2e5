"""One trainer in several processes: how they find one another, and how the others follow the first."""
