package knative

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// What docs/knative.md says: MEASURE=1 make e2e RUN=TestMeasure.
func TestMeasure(t *testing.T) {
	if os.Getenv("MEASURE") == "" {
		t.Skip("MEASURE=1 measures")
	}
	deployed(t)
	t.Run("cold start of each service by itself", func(t *testing.T) {
		hello := image(t, "e2e/knative/hello")
		apply(t, fmt.Sprintf(helloService, hello))
		apply(t, strings.Replace(fmt.Sprintf(helloService, hello), "name: hello, ", "name: foot, ", 1))
		foot := serving(t, "foot")
		serving(t, "hello")
		const rounds = 7
		times := map[string][]time.Duration{}
		for range rounds {
			asleep(t, 3*time.Minute, "serving.knative.dev/service notin (ingress,foot),serving.knative.dev/service", namespace, "hello")
			for _, name := range append([]string{"hello"}, scaleToZero...) {
				in := namespace
				if name == "hello" {
					in = name
				}
				if err := get(t.Context(), foot); err != nil { // it is awake
					t.Fatal(err)
				}
				start := time.Now()
				err := get(t.Context(), foot+"/get?url="+url.QueryEscape("http://"+name+"."+in+".svc.cluster.local/health"))
				if err != nil {
					t.Fatal(err)
				}
				times[name] = append(times[name], time.Since(start))
			}
		}
		for _, name := range append([]string{"hello"}, scaleToZero...) {
			t.Logf("| %s | %.2f | %.2f | %.2f |", name, slices.Min(times[name]).Seconds(), median(times[name]).Seconds(), slices.Max(times[name]).Seconds())
		}
	})
	address := route(t)
	for _, n := range []int{1, 2, 3, 0} {
		name := fmt.Sprintf("%d ingress replicas", n)
		bounds := []int{n, n}
		if n == 0 {
			name, bounds = "by HPA", []int{1, 3}
		}
		t.Run(name, func(t *testing.T) {
			kubectl(t, "-n", namespace, "patch", "ksvc", "ingress", "--type=merge", "-p", fmt.Sprintf(
				`{"spec":{"template":{"metadata":{"annotations":{"autoscaling.knative.dev/min-scale":"%d","autoscaling.knative.dev/max-scale":"%d"}}}}}`, bounds[0], bounds[1]))
			kubectl(t, "-n", namespace, "wait", "ksvc", "ingress", "--for=condition=Ready", "--timeout=2m")
			prune(t, "ingress")
			until(t, 2*time.Minute, func(ctx context.Context) error {
				all, err := pods(ctx, ofService("ingress"))
				if err == nil && len(all) != bounds[0] {
					err = fmt.Errorf("%d pods, not %d", len(all), bounds[0])
				}
				return err
			})
			measure(t, address+"/reports", 50, 5*time.Second) // warms it up
			for _, users := range []int{1, 50, 200} {
				measured := measure(t, address+"/reports", users, 20*time.Second)
				t.Logf("| %s | %d | %s |", name, users, measured)
			}
			all, err := pods(t.Context(), ofService("ingress"))
			t.Logf("%d pods at the end (%v)\n%s", len(all), err, kubectl(t, "top", "pods", "-n", namespace, "--containers"))
		})
	}
	t.Run("what a pod weighs when it is idle", func(t *testing.T) {
		until(t, 2*time.Minute, oneReplica)
		report(t, address+"/reports")
		until(t, time.Minute, func(context.Context) error {
			top := kubectl(t, "top", "pods", "-n", namespace, "--containers")
			for _, name := range onTheRoad {
				if !strings.Contains(top, " "+name+" ") {
					return fmt.Errorf("no figures of %s yet", name)
				}
			}
			t.Log("\n" + top)
			return nil
		})
	})
}

// measure has clients post a report each, one after the other, and returns rate, median and 99th percentile.
func measure(t *testing.T, address string, clients int, duration time.Duration) string {
	t.Helper()
	var mu sync.Mutex
	var times []time.Duration
	var not int
	var posting sync.WaitGroup
	start := time.Now()
	for range clients {
		posting.Go(func() {
			for time.Since(start) < duration {
				before := time.Now()
				status, _, err := post(t.Context(), address, `{"description":"Test","country":"GT","weather":"Sunny"}`)
				took := time.Since(before)
				mu.Lock()
				times = append(times, took)
				if err != nil || status != http.StatusAccepted {
					not++
				}
				mu.Unlock()
			}
		})
	}
	posting.Wait()
	slices.Sort(times)
	return fmt.Sprintf("%.0f | %.1f | %.1f | %d", float64(len(times)-not)/time.Since(start).Seconds(),
		times[len(times)/2].Seconds()*1000, times[len(times)*99/100].Seconds()*1000, not)
}
