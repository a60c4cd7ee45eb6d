"""The coordinator: state folder, certificates, registry of sites and people, Flower's SuperLink, supervision."""
