package knative

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// helloService is what a cold start is compared with. It is as patient as ours, so that all are at zero together.
const helloService = `
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: hello, namespace: hello}
spec:
  template:
    metadata: {annotations: {autoscaling.knative.dev/window: 30s}}
    spec:
      containers:
        - image: %s
          securityContext:
            runAsNonRoot: true
            allowPrivilegeEscalation: false
            capabilities: {drop: [ALL]}
            seccompProfile: {type: RuntimeDefault}
`

// serving waits until the service is ready, one of those in the namespace hello, and returns its URL.
func serving(t *testing.T, name string) string {
	t.Helper()
	kubectl(t, "-n", "hello", "wait", "ksvc", name, "--for=condition=Ready", "--timeout=2m")
	address := strings.TrimSpace(kubectl(t, "-n", "hello", "get", "ksvc", name, "-o", "jsonpath={.status.url}"))
	until(t, 20*time.Second, func(ctx context.Context) error { return get(ctx, address) })
	return address
}

func get(ctx context.Context, address string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if said, err := io.ReadAll(answer.Body); err != nil || answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s %w", answer.Status, said, err)
	}
	return nil
}

// asleep waits until no pod of these services serves any more. One that still winds down can't serve either: Knative gives
// it half a minute for requests that are under way.
func asleep(t *testing.T, patience time.Duration, label string, in ...string) {
	t.Helper()
	until(t, patience, func(ctx context.Context) error {
		for _, n := range in {
			out, err := run(ctx, "", "kubectl", "-n", n, "get", "pods", "-l", label,
				"-o", `jsonpath={range .items[*]}{.metadata.name}{.metadata.deletionTimestamp}{"\n"}{end}`)
			if err != nil {
				return err
			}
			for line := range strings.Lines(out) {
				if !strings.HasSuffix(line, "Z\n") {
					return fmt.Errorf("%s still serves", strings.TrimSpace(line))
				}
			}
		}
		return nil
	})
}

// A report that wakes all of Isobar takes at most 2.5 times as long to be counted in both stores as the smallest service
// there is takes to wake and answer: the medians of ten, one after the other in turn.
func TestFromZero(t *testing.T) {
	deployed(t)
	apply(t, fmt.Sprintf(helloService, image(t, "e2e/knative/hello")))
	hello := serving(t, "hello")
	address := route(t) + "/reports"

	const rounds, most = 10, 2.5
	var helloTimes, roadTimes []time.Duration
	for i := range rounds {
		if i == 0 {
			atZero(t, 3*time.Minute, scaleToZero...)
		}
		asleep(t, 3*time.Minute, "serving.knative.dev/service notin (ingress),serving.knative.dev/service", namespace, "hello")
		anyMoment()
		start := time.Now()
		if err := get(t.Context(), hello); err != nil {
			t.Fatal(err)
		}
		helloTimes = append(helloTimes, time.Since(start))

		anyMoment()
		start = time.Now()
		report(t, address)
		accepted := time.Since(start)
		at := counted(t, 30*time.Second, inGT(i+1))
		redis, valkey := at["redis"].Sub(start), at["valkey"].Sub(start)
		roadTimes = append(roadTimes, max(redis, valkey))
		t.Logf("hello %.2f s; accepted after %.2f s, counted in Redis after %.2f s, in Valkey after %.2f s",
			helloTimes[i].Seconds(), accepted.Seconds(), redis.Seconds(), valkey.Seconds())
	}
	ratio := median(roadTimes).Seconds() / median(helloTimes).Seconds()
	t.Logf("medians: hello %.2f s, the road %.2f s: %.2f times", median(helloTimes).Seconds(), median(roadTimes).Seconds(), ratio)
	if ratio > most {
		t.Errorf("from zero a report takes %.2f times as long as a hello, at most %.1f times is promised", ratio, most)
	}
}

// anyMoment waits for one. The kubelet looks every second for what has started, so that whatever begins just after it has
// looked takes longest; and what has just started is still at work.
func anyMoment() { time.Sleep(time.Second + rand.N(time.Second)) }

func TestBackToZero(t *testing.T) {
	deployed(t)
	l := begins(t.Context(), route(t), 2000, 1000)
	want := l.end(t)
	counted(t, time.Minute, want)
	took := atZero(t, 4*time.Minute, scaleToZero...)
	t.Logf("no pod is left %.0f s after the last report", took.Seconds())
	counted(t, time.Second, want)
	if all, err := pods(t.Context(), ofService("ingress")); err != nil || len(all) != 1 {
		t.Errorf("the ingress has %d pods, not 1 (%v)", len(all), err)
	}
}

// hpa is what the HPA's own object says.
type hpa struct {
	utilization, replicas int
}

func readHPA(ctx context.Context) (hpa, error) {
	out, err := run(ctx, "", "kubectl", "-n", namespace, "get", "hpa", "-l", ofService("ingress"), "-o", "json")
	if err != nil {
		return hpa{}, err
	}
	var list struct {
		Items []struct {
			Status struct {
				CurrentReplicas int
				CurrentMetrics  []struct {
					Resource struct {
						Current struct{ AverageUtilization int }
					}
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return hpa{}, err
	}
	var h hpa
	for _, item := range list.Items {
		h.replicas = max(h.replicas, item.Status.CurrentReplicas)
		for _, m := range item.Status.CurrentMetrics {
			h.utilization = max(h.utilization, m.Resource.Current.AverageUtilization)
		}
	}
	return h, nil
}

// Locust's 50 users load the ingress: its HPA sees it, scales it out, nobody's request fails, and afterwards one replica
// is left and every report is counted once.
func TestHPA(t *testing.T) {
	deployed(t)
	address := route(t)
	until(t, 3*time.Minute, oneReplica)

	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	target, headers := address, ""
	if g := gateway(); g != "" {
		target, headers = "http://"+g, host(t, address)
	}
	locust := exec.CommandContext(ctx, filepath.Join(root, "config/load/locust.sh"), "--headless", "--users", "50",
		"--spawn-rate", "5", "--run-time", "2m", "--stop-timeout", "30", "--host", target, "--csv", filepath.Join(dir, "locust"), "--only-summary")
	locust.Env = append(os.Environ(), "ROUTE_HOST="+headers, "ACCEPTED_FILE="+filepath.Join(dir, "accepted"))
	said, err := os.Create(filepath.Join(dir, "said"))
	if err != nil {
		t.Fatal(err)
	}
	locust.Stdout, locust.Stderr = said, said
	if err := locust.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- locust.Wait() }()
	var most hpa
	for running := true; running; {
		select {
		case err = <-done:
			running = false
		case <-time.After(2 * time.Second):
			h, err := readHPA(t.Context())
			if err != nil {
				t.Error(err)
			}
			most = hpa{max(most.utilization, h.utilization), max(most.replicas, h.replicas)}
		}
	}
	text, _ := os.ReadFile(said.Name())
	t.Logf("locust:\n%s", text)
	if err != nil {
		t.Errorf("locust: %v", err)
	}
	requests, failures := locustTotals(t, filepath.Join(dir, "locust_stats.csv"))
	t.Logf("%s requests, %s failed; the HPA saw %d %% and had %d replicas at most", requests, failures, most.utilization, most.replicas)
	if failures != "0" {
		t.Errorf("%s of %s requests failed", failures, requests)
	}
	if most.utilization <= 30 {
		t.Errorf("the HPA saw %d %% CPU at most, not over 30", most.utilization)
	}
	if most.replicas < 2 || most.replicas > 3 {
		t.Errorf("the HPA had %d replicas at most, not 2 or 3", most.replicas)
	}
	var want counts
	accepted, err := os.ReadFile(filepath.Join(dir, "accepted"))
	if err == nil {
		want, err = parseAccepted(accepted)
	}
	if err != nil {
		t.Fatal(err)
	}
	counted(t, time.Minute, want)
	start := time.Now()
	until(t, 4*time.Minute, oneReplica)
	t.Logf("back to one replica after %.0f s", time.Since(start).Seconds())
}

func parseAccepted(text []byte) (counts, error) {
	c := counts{countries: map[string]int{}}
	err := json.Unmarshal(text, &c.countries)
	for _, n := range c.countries {
		c.total += n
	}
	return c, err
}

func oneReplica(ctx context.Context) error {
	all, err := pods(ctx, ofService("ingress"))
	if err == nil && len(all) != 1 {
		err = fmt.Errorf("the ingress has %d pods", len(all))
	}
	return err
}

// locustTotals are the numbers of requests and of failures.
func locustTotals(t *testing.T, path string) (requests, failures string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		if row[1] == "Aggregated" {
			return row[2], row[3]
		}
	}
	t.Fatalf("%s has no totals", path)
	return "", ""
}
