package knative

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"isobar.dev/config/local"
)

// address is the name of a broker or store in the cluster, by which the services call it.
type address struct {
	namespace, service string
	port               int
}

var addresses = map[local.Kind]address{
	local.KafkaKind:    {"kafka", "weather-kafka-kafka-bootstrap", 9092},
	local.RabbitMQKind: {"rabbitmq", "rabbitmq", 5672},
	local.RedisKind:    {"redis", "redis-master", 6379},
	local.ValkeyKind:   {"default", "valkey-primary", 6379},
}

// peers are the brokers and stores: those that are in the cluster, and for each that is not a server of make run, brought
// into the cluster under its name there.
type peers struct {
	dir     string
	host    string // this machine's address, as the cluster sees it
	servers map[local.Kind]*local.Process
	forward map[local.Kind]string // HOST:PORT of a store in the cluster
	stop    []func() error
}

func (p *peers) namespaces() []string { return []string{"kafka", "rabbitmq", "redis"} }

// begin finds out which are in the cluster.
func (p *peers) begin(ctx context.Context) error {
	node, err := run(ctx, "", "kubectl", "get", "nodes", "-o", `jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}`)
	if err != nil {
		return err
	}
	to, err := net.Dial("udp", net.JoinHostPort(node, "9")) // which sends nothing
	if err != nil {
		return fmt.Errorf("find this machine's address on the way to node %s: %w", node, err)
	}
	p.host, _, _ = net.SplitHostPort(to.LocalAddr().String())
	to.Close()
	p.servers, p.forward = map[local.Kind]*local.Process{}, map[local.Kind]string{}
	for kind, a := range addresses {
		if _, err := run(ctx, "", "kubectl", "-n", a.namespace, "get", "service", a.service); err != nil {
			p.servers[kind] = nil
		}
	}
	if len(p.servers) == 0 {
		return nil
	}
	if err := local.Install(ctx, os.Stderr); err != nil {
		return err
	}
	p.dir, err = os.MkdirTemp("", "isobar-e2e-")
	return err
}

// start starts the servers that the cluster lacks, under the passwords that the cluster has for them.
func (p *peers) start(t *testing.T) {
	t.Helper()
	p.passwords(t)
	manifests := ""
	start := map[local.Kind]func(string, int, ...local.Option) *local.Process{
		local.KafkaKind: local.Kafka, local.RabbitMQKind: local.RabbitMQ, local.RedisKind: local.Redis, local.ValkeyKind: local.Valkey,
	}
	for kind := range p.servers {
		port, err := local.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		options := []local.Option{local.On(p.host)}
		switch kind {
		case local.RabbitMQKind:
			options = append(options, local.Login("administrator", rand.Text()), local.Account(p.secret(t, kind, "username"), p.secret(t, kind, "password"),
				local.Permissions{Configure: "^$", Write: `^amq\.default$`, Read: "^message$"})) // as in eventing/rabbitmq
		case local.RedisKind, local.ValkeyKind:
			options = append(options, local.Login("default", p.admin(t, kind)),
				local.Config(fmt.Sprintf("user %s on >%s %s", p.secret(t, kind, "username"), p.secret(t, kind, "password"), rights(t))))
		}
		server := start[kind](filepath.Join(p.dir, string(kind)), port, options...)
		p.servers[kind] = server
		p.stop = append(p.stop, server.Kill)
		a := addresses[kind]
		manifests += fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: %[2]s}
spec: {ports: [{port: %[3]d, targetPort: %[5]d}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s, namespace: %[2]s, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
endpoints: [{addresses: [%[4]s]}]
ports: [{port: %[5]d}]
`, a.service, a.namespace, a.port, p.host, port)
	}
	if _, err := run(t.Context(), manifests, "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	p.stop = append(p.stop, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, err := run(ctx, manifests, "kubectl", "delete", "--ignore-not-found", "-f", "-")
		return err
	})
	p.up(t)
	for _, kind := range []local.Kind{local.RedisKind, local.ValkeyKind} {
		if _, ours := p.servers[kind]; !ours {
			p.portForward(t, kind)
		}
	}
}

// passwords makes the passwords, as the README has it, and lets the pods reach servers outside the cluster.
func (p *peers) passwords(t *testing.T) {
	t.Helper()
	readme(t, "Passwords")
	if len(p.servers) == 0 {
		return
	}
	policy := fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: to-servers-outside, namespace: %s}
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress: [{to: [{ipBlock: {cidr: %s/32}}]}]
`, namespace, p.host)
	if _, err := run(t.Context(), policy, "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

// up starts the servers that do not run.
func (p *peers) up(t *testing.T) {
	t.Helper()
	for _, server := range p.servers {
		if server.Pid() != 0 {
			continue
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		err := server.Start(ctx)
		cancel()
		if err != nil {
			t.Fatalf("%v\n%s", err, local.Tail(server.Log(), 30))
		}
	}
}

// down kills the servers.
func (p *peers) down(t *testing.T) {
	t.Helper()
	for _, server := range p.servers {
		if err := server.Kill(); err != nil {
			t.Fatal(err)
		}
	}
}

// ours skips the test where a broker or store is not one that it may stop, or talk to directly.
func (p *peers) ours(t *testing.T, kinds ...local.Kind) {
	t.Helper()
	for _, kind := range kinds {
		if _, ours := p.servers[kind]; !ours {
			t.Skipf("%s is the cluster's own: this test needs one that it may stop and reach", kind)
		}
	}
}

// secret is what our programs have in theirs.
func (p *peers) secret(t *testing.T, kind local.Kind, key string) string {
	t.Helper()
	return secret(t, namespace, string(kind), key)
}

// admin is the password of a store's user default, who may do everything.
func (p *peers) admin(t *testing.T, kind local.Kind) string {
	t.Helper()
	return secret(t, addresses[kind].namespace, string(kind), "default")
}

func secret(t *testing.T, namespace, name, key string) string {
	t.Helper()
	text, err := base64.StdEncoding.DecodeString(kubectl(t, "-n", namespace, "get", "secret", name, "-o", "jsonpath={.data."+key+"}"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// rights are those of the writers' user.
func rights(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "counts/rights.acl"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// portForward makes a store in the cluster reachable from here.
func (p *peers) portForward(t *testing.T, kind local.Kind) {
	t.Helper()
	port, err := local.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	a := addresses[kind]
	cmd := exec.Command("kubectl", "-n", a.namespace, "port-forward", "service/"+a.service, fmt.Sprintf("%d:%d", port, a.port))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.stop = append(p.stop, func() error { _ = cmd.Process.Kill(); _ = cmd.Wait(); return nil })
	p.forward[kind] = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	until(t, 20*time.Second, func(context.Context) error {
		conn, err := net.Dial("tcp", p.forward[kind])
		if err == nil {
			err = conn.Close()
		}
		return err
	})
}

// stores are clients of both stores, by name.
func (p *peers) stores(t *testing.T) map[string]*redis.Client {
	t.Helper()
	clients := map[string]*redis.Client{}
	for _, kind := range []local.Kind{local.RedisKind, local.ValkeyKind} {
		addr := p.forward[kind]
		if server := p.servers[kind]; server != nil {
			addr = server.Addr()
		}
		c := redis.NewClient(&redis.Options{Addr: addr, MaxRetries: 10, Password: p.admin(t, kind)})
		t.Cleanup(func() { _ = c.Close() })
		clients[string(kind)] = c
	}
	return clients
}

// empty empties the stores.
func (p *peers) empty(t *testing.T) {
	t.Helper()
	for name, store := range p.stores(t) {
		keys := []string{"country:counts", "weather:counts", "messages:total"}
		if err := store.Del(t.Context(), keys...).Err(); err != nil {
			t.Fatalf("empty %s: %v", name, err)
		}
	}
}

func (p *peers) end(context.Context) error {
	var errs []error
	for i := len(p.stop) - 1; i >= 0; i-- {
		errs = append(errs, p.stop[i]())
	}
	if p.dir != "" {
		errs = append(errs, os.RemoveAll(p.dir))
	}
	return errors.Join(errs...)
}

// counts is what a store says of the reports.
type counts struct {
	total     int
	countries map[string]int
}

func (c counts) equal(d counts) bool {
	return c.total == d.total && maps.Equal(c.countries, d.countries)
}

func readCounts(ctx context.Context, store *redis.Client) (counts, error) {
	c := counts{countries: map[string]int{}}
	total, err := store.Get(ctx, "messages:total").Int()
	if err != nil && !errors.Is(err, redis.Nil) {
		return c, err
	}
	c.total = total
	fields, err := store.HGetAll(ctx, "country:counts").Result()
	for country, n := range fields {
		c.countries[country], _ = strconv.Atoi(n)
	}
	return c, err
}

// counted waits until both stores say exactly what is wanted, and returns when each of them did.
func counted(t *testing.T, patience time.Duration, want counts) map[string]time.Time {
	t.Helper()
	return countedIn(t, patience, map[string]counts{"redis": want, "valkey": want})
}

// countedIn is counted where each store is to say something of its own.
func countedIn(t *testing.T, patience time.Duration, want map[string]counts) map[string]time.Time {
	t.Helper()
	at := map[string]time.Time{}
	stores := cluster.peers.stores(t)
	for deadline := time.Now().Add(patience); len(at) < len(stores); time.Sleep(5 * time.Millisecond) {
		for name, store := range stores {
			if !at[name].IsZero() {
				continue
			}
			got, err := readCounts(t.Context(), store)
			switch {
			case err == nil && got.equal(want[name]):
				at[name] = time.Now()
			case err == nil && got.total > want[name].total, time.Now().After(deadline):
				t.Fatalf("%s has counted %+v, want %+v (%v)", name, got, want[name], err)
			}
		}
	}
	return at
}

func inGT(n int) counts { return counts{n, map[string]int{"GT": n}} }
