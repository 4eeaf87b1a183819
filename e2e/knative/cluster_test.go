// Package knative proves Isobar on a real Kubernetes with Knative, the one that KUBECONFIG names. `make e2e` runs it.
package knative

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const namespace = "isobar"

// The services, in the order of the road.
var (
	services    = []string{"ingress", "publisher", "redis-writer", "valkey-writer", "dead-letter"}
	scaleToZero = services[1:]
	onTheRoad   = services[:4]
)

// root is this project's folder.
const root = "../.."

// cluster is what all tests share: it is made by the first one that needs it.
var cluster struct {
	peers    peers
	once     sync.Once
	deployed bool
	made     []string // namespaces
	curlHome string
}

func TestMain(m *testing.M) {
	if os.Getenv("E2E") == "" {
		fmt.Println("needs a cluster: make e2e")
		return
	}
	told := make(chan os.Signal, 1)
	signal.Notify(told, os.Interrupt, syscall.SIGTERM)
	done := make(chan int, 1)
	go func() {
		if err := begin(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			done <- 1
			return
		}
		done <- m.Run()
	}()
	code := 1
	select {
	case code = <-done:
	case <-told:
		fmt.Fprintln(os.Stderr, "told to stop: taking everything away")
	}
	if err := end(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// begin makes the namespaces, and refuses to where somebody else's Isobar may be.
func begin() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if out, err := run(ctx, "", "kubectl", "get", "--raw", "/readyz"); err != nil {
		return fmt.Errorf("no cluster answers at what KUBECONFIG names: %s %w", out, err)
	}
	if _, err := run(ctx, "", "kubectl", "get", "namespace", namespace); err == nil {
		return fmt.Errorf("namespace %q is there already: the tests make and remove it, so it must not be anybody's", namespace)
	}
	if err := cluster.peers.begin(ctx); err != nil {
		return err
	}
	if err := resolveForCurl(); err != nil {
		return err
	}
	for _, n := range append([]string{namespace, "hello"}, cluster.peers.namespaces()...) {
		if _, err := run(ctx, "", "kubectl", "get", "namespace", n); err == nil {
			continue
		}
		if out, err := run(ctx, "", "kubectl", "create", "namespace", n); err != nil {
			return fmt.Errorf("%s%w", out, err)
		}
		cluster.made = append(cluster.made, n)
	}
	return nil
}

// resolveForCurl has the README's curl find the routes, where their names are not resolved here.
func resolveForCurl() error {
	if gateway() == "" {
		return nil
	}
	cluster.curlHome, _ = os.MkdirTemp("", "isobar-curl-")
	text := fmt.Sprintf("connect-to = \"::%s\"\n", gateway())
	if err := os.WriteFile(filepath.Join(cluster.curlHome, ".curlrc"), []byte(text), 0o644); err != nil {
		return err
	}
	return os.Setenv("CURL_HOME", cluster.curlHome)
}

func end() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	errs := []error{cluster.peers.end(ctx)}
	if cluster.curlHome != "" {
		errs = append(errs, os.RemoveAll(cluster.curlHome))
	}
	for _, n := range cluster.made {
		out, err := run(ctx, "", "kubectl", "delete", "namespace", n, "--ignore-not-found", "--wait")
		if err != nil {
			errs = append(errs, fmt.Errorf("%s%w", out, err))
		}
	}
	return errors.Join(errs...)
}

// run runs a command in the project's folder and returns what it printed; its error has what it printed to stderr.
func run(ctx context.Context, stdin, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = root
	cmd.Stdin = strings.NewReader(stdin)
	cmd.WaitDelay = 10 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, &errs)
	}
	return out.String(), err
}

// kubectl runs kubectl, which must succeed.
func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := run(context.WithoutCancel(t.Context()), "", "kubectl", args...)
	if err != nil {
		t.Fatalf("%v%s", err, out)
	}
	return out
}

// apply applies manifests and takes them away when the test ends.
func apply(t *testing.T, manifests string) {
	t.Helper()
	if out, err := run(t.Context(), manifests, "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatalf("%v%s", err, out)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := run(ctx, manifests, "kubectl", "delete", "--ignore-not-found", "-f", "-"); err != nil {
			t.Error(err)
		}
	})
}

// until asks again and again until there is no error, which is what is told when the time is over.
func until(t *testing.T, patience time.Duration, ask func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := again(ctx, 200*time.Millisecond, ask); err != nil {
		t.Fatalf("after %v: %v", patience, err)
	}
}

func again(ctx context.Context, pause time.Duration, ask func(context.Context) error) error {
	for {
		err := ask(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// pod is what the tests want to know of a pod.
type pod struct{ name, ip string }

// pods returns those with the label, also the ones that are being deleted.
func pods(ctx context.Context, label string) ([]pod, error) {
	out, err := run(ctx, "", "kubectl", "-n", namespace, "get", "pods", "-l", label, "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct{ PodIP string }
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, err
	}
	var all []pod
	for _, p := range list.Items {
		all = append(all, pod{p.Metadata.Name, p.Status.PodIP})
	}
	return all, nil
}

func ofService(name string) string { return "serving.knative.dev/service=" + name }

// atZero waits until none of the services has a pod, and returns how long that took.
func atZero(t *testing.T, patience time.Duration, names ...string) time.Duration {
	t.Helper()
	start := time.Now()
	until(t, patience, func(ctx context.Context) error {
		all, err := pods(ctx, "serving.knative.dev/service in ("+strings.Join(names, ",")+")")
		if err == nil && len(all) > 0 {
			err = fmt.Errorf("%d pods are left, the first is %s", len(all), all[0].name)
		}
		return err
	})
	return time.Since(start)
}

// image builds a program of the tests' own.
func image(t *testing.T, folder string) string {
	t.Helper()
	out, err := run(t.Context(), "", "ko", "build", "--base-import-paths", "./"+folder)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// deployed returns once all of Isobar runs in the cluster, by the README's commands, and the stores are empty.
func deployed(t *testing.T) {
	t.Helper()
	cluster.once.Do(func() {
		cluster.peers.start(t)
		deploy(t)
	})
	if !cluster.deployed {
		t.Fatal("it could not be deployed")
	}
	cluster.peers.empty(t)
}

// deploy runs the README's commands.
func deploy(t *testing.T) {
	t.Helper()
	cluster.deployed = false
	readme(t, "Deploy")
	// Just after a service is ready the gateway may not know it yet.
	address := route(t)
	until(t, 20*time.Second, func(ctx context.Context) error { return get(ctx, address+"/health") })
	cluster.deployed = true
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(kubectl(t, "-n", namespace, "get", "ksvc,pods,containersources,hpa", "-o", "wide"))
		}
	})
}

// takeAway runs the README's commands for that, and looks whether they left something.
func takeAway(t *testing.T) {
	t.Helper()
	cluster.deployed = false
	readme(t, "Take it away")
	if out, err := run(t.Context(), "", "kubectl", "get", "namespace", namespace); err == nil {
		t.Fatalf("the namespace is still there: %s", out)
	}
}

// readme runs the commands that README.md prints in the section of that heading, as they are printed there, and returns
// what they print.
func readme(t *testing.T, heading string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "\n### "+heading+"\n")
	if !found {
		t.Fatalf("README.md has no section %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n#")
	var commands []string
	for i, part := range strings.Split(section, "\n```") {
		if block, shell := strings.CutPrefix(part, "sh\n"); shell && i%2 == 1 {
			commands = append(commands, block)
		}
	}
	if len(commands) == 0 {
		t.Fatalf("README.md has no commands under %q", heading)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 10*time.Minute)
	defer cancel()
	start := time.Now()
	out, err := run(ctx, "", "bash", "-euo", "pipefail", "-c", strings.Join(commands, "\n"))
	t.Logf("README, %s (%.1f s):\n%s", heading, time.Since(start).Seconds(), out)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// gateway is HOST:PORT of the gateway for who does not resolve the routes' names: INGRESS_ADDR, if it is set.
func gateway() string { return os.Getenv("INGRESS_ADDR") }

// route is the URL of the ingress, from outside.
func route(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(kubectl(t, "-n", namespace, "get", "ksvc", "ingress", "-o", "jsonpath={.status.url}"))
}

// client calls routes.
var client = &http.Client{
	Timeout: 30 * time.Second,
	Transport: &http.Transport{
		MaxIdleConnsPerHost: 100,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if g := gateway(); g != "" {
				addr = g
			}
			return (&net.Dialer{}).DialContext(ctx, network, addr)
		},
	},
}

// host is that of a URL.
func host(t *testing.T, address string) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil || u.Host == "" {
		t.Fatalf("%q is no URL of a route", address)
	}
	return u.Host
}

// median is the one in the middle, of an even number the higher.
func median(times []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(times))
	return sorted[len(sorted)/2]
}
