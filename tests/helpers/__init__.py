"""What several tests share: commands run as a user would, nodes, layouts, endpoints, a browser."""
