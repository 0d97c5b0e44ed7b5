#!/bin/sh
# Tells Harbor to tell of every push, and makes the account that indexes them: setup.sh PROJECT
#
# Needs: curl, jq, and an administrator of the project. Writes `token` and `config.json` for compose.yaml or
#   kubernetes.yaml; who can read them can push. Run it once for each project; the token is kept, and so are the logins.
#   It can be run again: what is there already is used, and a robot whose secret was lost gets a new one.
#   HARBOR         https://harbor.example
#   HARBOR_NETRC   a file with `machine harbor.example login USER password PASSWORD`
#   WEBHOOK        where Harbor reaches the server [default: http://soci-webhook:8480/webhook]
# No secret is in an argument: curl reads the password from the file, and bodies from standard input.
set -eu
umask 077
project=$1
host=${HARBOR#*://}
webhook=${WEBHOOK:-http://soci-webhook:8480/webhook}

# Asks Harbor: a method and a path, with what it reads as the body. The answer is in answer.json; what there is already is
# told by the status 3, any other refusal is shown.
api() {
    method=$1
    path=$2
    set -- --silent --show-error --fail-with-body --netrc-file "$HARBOR_NETRC" --header 'X-Is-Resource-Name: true'
    [ "$method" = GET ] || set -- "$@" --header 'Content-Type: application/json' --data @-
    status=$(curl "$@" --request "$method" --output answer.json --write-out '%{http_code}' "$HARBOR/api/v2.0/$path" \
        2> refusal) && return 0
    [ "$status" = 409 ] && return 3
    cat refusal answer.json >&2
    return 1
}
trap 'rm -f answer.json refusal robot.json robot.json.new policy.json' EXIT

# What the Authorization header of every event will be.
[ -s token ] || printf 'Bearer %s\n' "$(head -c 32 /dev/urandom | base64 | tr -d '/+=\n')" > token

# The account: it pulls and pushes in this project and deletes nothing. Harbor gives it the name `robot$PROJECT+soci`;
# wherever that is typed, single quotes keep its `$` from the shell, and `$$` does in compose files.
[ -s config.json ] || echo '{}' > config.json
made=0
jq -n --arg project "$project" '{
    name: "soci", description: "indexes images for lazy loading", duration: -1, level: "project",
    permissions: [{ kind: "project", namespace: $project, access: [
        { resource: "repository", action: "pull" }, { resource: "repository", action: "push" }
    ] }]
}' | api POST robots || made=$?
case $made in
0) mv answer.json robot.json ;;
3)
    # An earlier run made it; if it did not get to write the secret down, there is a new one.
    api GET "projects/$project"
    api GET "robots?q=Level%3Dproject%2CProjectID%3D$(jq .project_id answer.json)&page_size=100"
    jq '[.[]? | select(.name | endswith("+soci"))] | first' answer.json > robot.json
    if ! jq -e --arg host "$host" --slurpfile robot robot.json \
        '.auths[$host].auth // "" | @base64d | startswith($robot[0].name + ":")' config.json > answer.json; then
        echo '{ "secret": "" }' | api PATCH "robots/$(jq .id robot.json)"
        jq --slurpfile answer answer.json '. + { secret: $answer[0].secret }' robot.json > robot.json.new
        mv robot.json.new robot.json
    fi
    ;;
*) exit 1 ;;
esac
# Docker's file has one login for a host: with several projects, make one robot of the whole system instead.
if jq -e '.secret // "" | length > 0' robot.json > answer.json; then
    jq --arg host "$host" --slurpfile robot robot.json \
        '.auths[$host] = { auth: ($robot[0] | .name + ":" + .secret | @base64) }' config.json > config.json.new
    mv config.json.new config.json
fi

# The policy: every pushed artifact, to the server, with the token.
jq -n --rawfile token token --arg address "$webhook" '{
    name: "soci", description: "indexes images for lazy loading", enabled: true, event_types: ["PUSH_ARTIFACT"],
    targets: [{
        type: "http", address: $address, auth_header: ($token | rtrimstr("\n")), skip_cert_verify: false,
        payload_format: "Default"
    }]
}' > policy.json
made=0
api POST "projects/$project/webhook/policies" < policy.json || made=$?
if [ "$made" = 3 ]; then
    api GET "projects/$project/webhook/policies?page_size=100"
    policy=$(jq '[.[]? | select(.name == "soci") | .id] | first' answer.json)
    made=0
    api PUT "projects/$project/webhook/policies/$policy" < policy.json || made=$?
fi
[ "$made" = 0 ] || exit 1
echo "$HARBOR tells $webhook of pushes to $project"
