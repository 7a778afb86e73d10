"""A standing campaign against the promises of all packages: `./noxw -s attack`."""
