#!/bin/sh
# Makes what compose.yaml expects in docker/secrets: the owner's secret, and an API key for each door. Run it once; it overwrites nothing.
set -eu
cd "$(dirname "$0")"
umask 077
if [ -e secrets ]; then
    echo "docker/secrets exists already; remove it to start with other secrets (a new owner secret is a new watermark)." >&2
    exit 1
fi
mkdir secrets
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
door=$(random)
shop=$(random)
echo "MEADEF_OWNER_SECRET=$(random)" >secrets/owner.env
echo "MEADEF_API_KEYS=thief:$door" >secrets/victim.env
echo "MEADEF_API_KEY=$door" >secrets/thief.env
echo "MEADEF_API_KEYS=judge:$shop" >secrets/suspect.env
echo "MEADEF_API_KEY=$shop" >secrets/judge.env
