package knative

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"isobar.dev/config/local"
)

// The README's commands, as they are printed there: what they post is counted once in both stores, as plain JSON and as
// a CloudEvent, and again when the same CloudEvent is sent once more.
func TestDeployAndReport(t *testing.T) {
	deployed(t)
	said := readme(t, "Report")
	if n := strings.Count(said, "202 Accepted"); n != 2 {
		t.Errorf("%d of 2 reports are accepted", n)
	}
	counted(t, 30*time.Second, inGT(2))
	said = readme(t, "Report")
	if n := strings.Count(said, "202 Accepted"); n != 2 {
		t.Errorf("%d of 2 reports are accepted", n)
	}
	counted(t, 30*time.Second, inGT(3)) // the CloudEvent is the same one, the plain report a new one
}

func TestByHand(t *testing.T) {
	deployed(t)
	said := readme(t, "By hand")
	if n := strings.Count(said, "202 Accepted"); n != 2 {
		t.Errorf("%d of 2 reports are accepted", n)
	}
	if !strings.Contains(said, "rabbitmq-source") {
		t.Error("kn does not list the RabbitMQ source")
	}
	counted(t, 30*time.Second, inGT(2))
}

// The images hold a program and nothing else: 15 MB at most as they are pulled, with a list of what they are made of.
func TestImages(t *testing.T) {
	deployed(t)
	for _, image := range images(t) {
		size, sbom := pulled(t, image)
		t.Logf("%s: %.1f MB", image, float64(size)/1e6)
		if size > 15e6 {
			t.Errorf("%s has %d bytes", image, size)
		}
		if !sbom {
			t.Errorf("%s has no SBOM", image)
		}
	}
}

// While brokers and stores are away every service becomes ready all the same, and who reports is told 503; when they come
// everything works, without a restart, and nothing is lost.
func TestPeersAwayAtDeployTime(t *testing.T) {
	deployed(t)
	peers := &cluster.peers
	peers.ours(t, local.Kinds...)
	takeAway(t)
	peers.down(t)
	t.Cleanup(func() { peers.up(t) })
	peers.passwords(t)
	deploy(t)
	status, _, err := post(t.Context(), route(t)+"/reports", `{"country":"GT","weather":"Sunny"}`)
	if err != nil || status != http.StatusServiceUnavailable {
		t.Errorf("without brokers a report is answered %d, not 503 (%v)", status, err)
	}

	// A ContainerSource's first pod has no sink yet, and another takes its place.
	kubectl(t, "-n", namespace, "wait", "containersource", "--all", "--for=condition=Ready", "--timeout=2m")
	restarts := restarted(t)
	l := begins(t.Context(), route(t), 200, 200)
	until(t, time.Minute, func(context.Context) error {
		if l.resent.Load() < clients {
			return fmt.Errorf("%d requests were answered no", l.resent.Load())
		}
		return nil
	})
	if n := l.accepted.Load(); n != 0 {
		t.Errorf("%d reports are accepted without brokers", n)
	}
	peers.up(t)
	counted(t, 2*time.Minute, l.end(t))
	for pod, after := range restarted(t) {
		if before, there := restarts[pod]; there && after != before {
			t.Errorf("the containers of %s have been restarted %s times, before the peers came %s times", pod, after, before)
		}
	}
}

// restarted tells of each pod how often its containers have been restarted.
func restarted(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for line := range strings.Lines(kubectl(t, "-n", namespace, "get", "pods", "-o",
		`jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[*].restartCount}{"\n"}{end}`)) {
		pod, times, _ := strings.Cut(strings.TrimSpace(line), " ")
		all[pod] = times
	}
	return all
}
