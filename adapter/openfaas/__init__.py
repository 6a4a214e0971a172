"""The OpenFaaS provider and gateway over any host: REST API, activator, proxy, asynchronous queue."""
