#!/bin/sh
# Tells Harbor to tell of every push, and makes the account that indexes them: setup.sh PROJECT
#
# Needs: curl, jq, and an administrator of the project. Writes `token` and `config.json` for compose.yaml or
#   kubernetes.yaml; who can read them can push. Run it once for each project; the token is kept, and so are the logins.
#   HARBOR         https://harbor.example
#   HARBOR_NETRC   a file with `machine harbor.example login USER password PASSWORD`
#   WEBHOOK        where Harbor reaches the server [default: http://soci-webhook:8480/webhook]
# No secret is in an argument: curl reads the password from the file, and bodies from standard input.
set -eu
umask 077
project=$1
host=${HARBOR#*://}
webhook=${WEBHOOK:-http://soci-webhook:8480/webhook}

# Sends what it reads; the answer is in answer.json, and is shown if it is a refusal.
api() {
    curl --silent --show-error --fail-with-body --netrc-file "$HARBOR_NETRC" --header 'Content-Type: application/json' \
        --header 'X-Is-Resource-Name: true' --request POST --data @- "$HARBOR/api/v2.0/$1" \
        > answer.json || { cat answer.json >&2; return 1; }
}

# What the Authorization header of every event will be.
[ -s token ] || printf 'Bearer %s\n' "$(head -c 32 /dev/urandom | base64 | tr -d '/+=\n')" > token

# The account: it pulls and pushes in this project and deletes nothing. Harbor gives it the name `robot$PROJECT+soci`;
# wherever that is typed, single quotes keep its `$` from the shell, and `$$` does in compose files.
jq -n --arg project "$project" '{
    name: "soci", description: "indexes images for lazy loading", duration: -1, level: "project",
    permissions: [{ kind: "project", namespace: $project, access: [
        { resource: "repository", action: "pull" }, { resource: "repository", action: "push" }
    ] }]
}' | api robots
[ -s config.json ] || echo '{}' > config.json
# Docker's file has one login for a host: with several projects, make one robot of the whole system instead.
jq --arg host "$host" --slurpfile robot answer.json \
    '.auths[$host] = { auth: ($robot[0] | .name + ":" + .secret | @base64) }' config.json > config.json.new
mv config.json.new config.json

# The policy: every pushed artifact, to the server, with the token.
jq -n --rawfile token token --arg address "$webhook" '{
    name: "soci", description: "indexes images for lazy loading", enabled: true, event_types: ["PUSH_ARTIFACT"],
    targets: [{
        type: "http", address: $address, auth_header: ($token | rtrimstr("\n")), skip_cert_verify: false,
        payload_format: "Default"
    }]
}' | api "projects/$project/webhook/policies"
rm answer.json
echo "$HARBOR tells $webhook of pushes to $project"
