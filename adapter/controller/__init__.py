"""What runs beside a framework on a cluster: the webhook that patches, and the controller that reconciles."""
