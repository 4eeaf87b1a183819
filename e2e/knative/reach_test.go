package knative

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// Only the ingress is reachable from outside, under whatever name the others are called at the gateway.
func TestFromOutside(t *testing.T) {
	deployed(t)
	address := route(t)
	if err := get(t.Context(), address+"/health"); err != nil {
		t.Errorf("the ingress: %v", err)
	}
	_, domain, _ := strings.Cut(strings.TrimPrefix(host(t, address), "ingress."), ".")
	for _, name := range scaleToZero {
		for _, host := range []string{name + "." + namespace + "." + domain, name + "." + namespace + ".svc.cluster.local", name + "." + namespace} {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address+"/health", nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Host = host
			answer, err := client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			answer.Body.Close()
			if answer.StatusCode != http.StatusNotFound {
				t.Errorf("%s is answered %s, not 404", host, answer.Status)
			}
		}
	}
}

// A pod that the picture has no arrow for reaches neither publisher nor writer.
func TestFromAPodWithoutAnArrow(t *testing.T) {
	deployed(t)
	hello := image(t, "e2e/knative/hello")
	apply(t, fmt.Sprintf(helloService, hello))
	stranger := serving(t, "hello")
	dial := func(ctx context.Context, addr string) error {
		return get(ctx, stranger+"/dial?addr="+url.QueryEscape(addr))
	}

	// Does this cluster's network enforce policies at all? One that allows nothing tells.
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: closed, namespace: hello, labels: {closed: "true"}}
spec:
  containers:
    - name: hello
      image: %s
      env: [{name: PORT, value: "8080"}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: hello}
spec: {podSelector: {matchLabels: {closed: "true"}}, policyTypes: [Ingress]}
`, hello))
	kubectl(t, "-n", "hello", "wait", "pod", "closed", "--for=condition=Ready", "--timeout=1m")
	ip := kubectl(t, "-n", "hello", "get", "pod", "closed", "-o", "jsonpath={.status.podIP}")
	if dial(t.Context(), ip+":8080") == nil {
		t.Skip("this cluster's network enforces no NetworkPolicy: a pod that may not be reached by anybody was reached")
	}
	report(t, route(t)+"/reports") // wakes them
	for _, name := range onTheRoad[1:] {
		until(t, 30*time.Second, func(ctx context.Context) error {
			all, err := pods(ctx, ofService(name))
			if err == nil && (len(all) == 0 || all[0].ip == "") {
				err = fmt.Errorf("%s has no pod yet", name)
			}
			for _, p := range all {
				if err := dial(ctx, p.ip+":8012"); err == nil {
					t.Errorf("a pod without an arrow reaches %s", name)
				}
			}
			return err
		})
	}
}
