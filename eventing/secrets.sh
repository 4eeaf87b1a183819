#!/usr/bin/env bash
# Makes the namespaces, and the Secrets that brokers, stores and our programs share: eventing/secrets.sh for a development
# cluster, eventing/secrets.sh production for one with TLS. What is there stays as it is, so it may run at any time; a Secret
# that was deleted comes anew, with another password or certificate, and then takes a restart of both sides. Nothing secret is
# printed, kept in a file or given on a command line.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")"

case ${1-} in
  "" | production) mode=${1:-development} ;;
  *) echo "usage: $0 [production]" >&2; exit 2 ;;
esac

# value NAMESPACE SECRET KEY: what is there, or nothing.
value() { kubectl get secret -n "$1" "$2" --ignore-not-found -o "jsonpath={.data['${3//./\\.}']}" | base64 -d; }

# namespace NAME LEVEL: as strict with its pods as what runs there allows.
namespace() {
  kubectl get namespace "$1" > /dev/null 2>&1 || kubectl create -f - << EOF
apiVersion: v1
kind: Namespace
metadata: {name: $1, labels: {pod-security.kubernetes.io/enforce: $2}}
EOF
}

# password NAMESPACE SECRET KEY: the one that is there, or a new one. It is fit for a URL.
password() {
  local there
  there=$(value "$@")
  printf %s "${there:-$(openssl rand -hex 24)}"
}

# put NAMESPACE SECRET [KEY VALUE]...: without the keys that have no value.
put() {
  local namespace=$1 name=$2
  shift 2
  {
    printf 'apiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: %s}\ndata:\n' "$name" "$namespace"
    while (($#)); do
      [[ -z $2 ]] || printf '  %s: %s\n' "$1" "$(printf %s "$2" | base64 | tr -d '\n')"
      shift 2
    done
  } | kubectl apply --server-side --force-conflicts --field-manager=secrets.sh -f -
}

# certificate NAMESPACE SECRET DNS...: a server's, for two years, by an authority of its own whose key nobody keeps. Who has
# cert-manager lets that make the Secret: tls.crt, tls.key and the authority's ca.crt.
certificate() {
  local namespace=$1 secret=$2 there names ca_key ca key
  shift 2
  there=$(value "$namespace" "$secret" tls.crt)
  if [[ -n $there ]]; then
    openssl x509 -noout -checkend $((30 * 24 * 3600)) <<< "$there" > /dev/null ||
      echo "secret/$secret in $namespace ends within 30 days: delete it, run this again, and restart both sides" >&2
    return
  fi
  names=$(printf ',DNS:%s' "$@")
  ca_key=$(new_key) key=$(new_key)
  ca=$(sign "$ca_key" -subj "/CN=$secret authority" \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign)
  put "$namespace" "$secret" ca.crt "$ca" tls.key "$key" tls.crt "$(
    sign "$key" -CA <(printf %s "$ca") -CAkey <(printf %s "$ca_key") -subj "/CN=$secret" \
      -addext "subjectAltName=${names#,}" -addext extendedKeyUsage=serverAuth
  )"
}

new_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256; }

# sign KEY OPTION...: the system's openssl.cnf would add extensions of its own.
sign() {
  openssl req -x509 -new -days 730 -config <(printf '[req]\ndistinguished_name = dn\n[dn]\n') -key <(printf %s "$1") "${@:2}"
}

hash() { printf %s "$1" | openssl dgst -sha256 -r | cut -d ' ' -f 1; }

# store NAMESPACE NAME: its users are ours, with just the rights that the counts take, and default, who may do everything.
store() {
  local ours admin
  ours=$(password "$1" "$2" password) admin=$(password "$1" "$2" default)
  put "$1" "$2" username isobar password "$ours" default "$admin" users.acl "user default on #$(hash "$admin") ~* &* +@all
user isobar on #$(hash "$ours") $(< ../counts/rights.acl)
"
  put isobar "$2" username isobar password "$ours" ca.crt "$(value "$1" "$2-tls" ca.crt)"
}

# The topology operator takes a user's password once: for another one, delete the User as well, and apply it again.
rabbitmq() {
  local ours ca
  ours=$(password rabbitmq rabbitmq password) ca=$(value rabbitmq rabbitmq-tls ca.crt)
  put rabbitmq rabbitmq username isobar password "$ours" ca.crt "$ca" uri rabbitmq.rabbitmq.svc.cluster.local # for RabbitmqSource
  put isobar rabbitmq username isobar password "$ours" ca.crt "$ca"
}

kafka() {
  local ours
  ours=$(password kafka kafka password)
  put kafka kafka username isobar password "$ours"
  put isobar kafka username isobar password "$ours" mechanism SCRAM-SHA-512 ca.crt "$(value kafka kafka-tls ca.crt)"
}

# trust: the topology operator calls RabbitMQ by TLS and takes the authorities of its own image only.
trust() {
  local ca
  ca=$(value rabbitmq rabbitmq-tls ca.crt)
  if ! kubectl get deployment -n rabbitmq-system messaging-topology-operator > /dev/null 2>&1; then
    echo "no messaging-topology-operator in rabbitmq-system: install it, and run this again for it to trust RabbitMQ" >&2
    return
  fi
  put rabbitmq-system rabbitmq-ca ca.crt "$ca"
  kubectl patch deployment -n rabbitmq-system messaging-topology-operator --patch-file /dev/stdin << EOF
spec:
  template:
    metadata:
      annotations: {isobar.dev/rabbitmq-ca: "$(hash "$ca")"}
    spec:
      containers:
        - name: manager
          volumeMounts:
            - {name: rabbitmq-ca, mountPath: /etc/ssl/certs/rabbitmq-ca.crt, subPath: ca.crt}
      volumes:
        - name: rabbitmq-ca
          secret: {secretName: rabbitmq-ca}
EOF
}

namespace isobar restricted
namespace redis restricted
namespace kafka baseline
namespace rabbitmq baseline
if [[ $mode == production ]]; then
  certificate kafka kafka-tls weather-kafka-kafka-bootstrap.kafka.svc{,.cluster.local} \
    "*.weather-kafka-kafka-brokers.kafka.svc"{,.cluster.local}
  certificate rabbitmq rabbitmq-tls rabbitmq.rabbitmq.svc{,.cluster.local} "*.rabbitmq-nodes.rabbitmq.svc"{,.cluster.local}
  certificate redis redis-tls redis-master.redis.svc{,.cluster.local}
  certificate default valkey-tls valkey-primary.default.svc{,.cluster.local}
  kafka
  trust
fi
rabbitmq
store redis redis
store default valkey
