"""The coordinator's only open port: Flower's fleet API for enrolled sites, our own doors for sites and for people.

    POST /v1/fleet/*      -> the SuperLink on loopback (`fleet`): only from a key that is enrolled and not revoked
    /fedscan/v1/site*     a site's own door, each request signed by its node key (`sites_door`)
    /fedscan/v1/runs ...  people, with a bearer token and a role (`people_door`, `runs`)
    everything else       404; Flower's Control and Runtime APIs have no way through

`python -m fedscan_server.edge STATE` runs it. server/docs/api.md describes the requests.
"""
