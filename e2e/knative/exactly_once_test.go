package knative

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/IBM/sarama"

	"isobar.dev/config/local"
)

// While 20,000 reports are posted, and posted again where the answer is not yes, pods of every service and source are
// deleted with no grace, a new revision of each service is rolled out, and each is forced to zero and back: both stores
// agree with what was sent.
func TestExactlyOnce(t *testing.T) {
	deployed(t)
	type fault struct {
		what  string
		cause func(t *testing.T)
	}
	var faults []fault
	for _, name := range onTheRoad {
		faults = append(faults,
			fault{"delete the pods of " + name, func(t *testing.T) { deletePods(t, ofService(name)) }},
			fault{"roll out a new revision of " + name, func(t *testing.T) { rollOut(t, name) }},
			fault{"force " + name + " to zero", func(t *testing.T) { forceToZero(t, name) }})
	}
	for _, name := range containerSources(t) {
		faults = append(faults, fault{"delete the pods of " + name, func(t *testing.T) { deletePods(t, "sources.knative.dev/containerSource="+name) }})
	}
	rand.Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })

	const reports, rate = 20_000, 300
	l := begins(t.Context(), route(t), reports, rate)
	for i, f := range faults {
		l.await(t, int64(reports*(2*i+1)/(2*len(faults))))
		start, before := time.Now(), l.accepted.Load()
		f.cause(t)
		t.Logf("%-45s at %5d accepted, done after %.1f s at %5d", f.what, before, time.Since(start).Seconds(), l.accepted.Load())
	}
	want := l.end(t)
	counted(t, 2*time.Minute, want)
	t.Logf("%d reports are counted once in each store, %d requests were sent again", want.total, l.resent.Load())
}

func containerSources(t *testing.T) []string {
	t.Helper()
	return strings.Fields(kubectl(t, "-n", namespace, "get", "containersources", "-o", "jsonpath={.items[*].metadata.name}"))
}

func deletePods(t *testing.T, label string) {
	t.Helper()
	kubectl(t, "-n", namespace, "delete", "pods", "-l", label, "--grace-period=0", "--force", "--wait=false")
}

// rollOut makes a new revision and waits until it has the traffic.
func rollOut(t *testing.T, name string) {
	t.Helper()
	patch := fmt.Sprintf(`{"spec":{"template":{"metadata":{"annotations":{"isobar.dev/rolled-out":"%d"}}}}}`, time.Now().UnixNano())
	before := latestReady(t, name)
	kubectl(t, "-n", namespace, "patch", "ksvc", name, "--type=merge", "-p", patch)
	until(t, 2*time.Minute, func(context.Context) error {
		if now := latestReady(t, name); now == before {
			return fmt.Errorf("%s is still at revision %s", name, now)
		}
		return nil
	})
	kubectl(t, "-n", namespace, "wait", "ksvc", name, "--for=condition=Ready", "--timeout=2m")
	prune(t, name)
}

// prune takes away the revisions without traffic: each of the ingress's would keep a pod.
func prune(t *testing.T, name string) {
	t.Helper()
	if _, err := run(t.Context(), "", "kn", "revision", "delete", "--prune", name, "--namespace", namespace); err != nil {
		t.Fatal(err)
	}
}

func latestReady(t *testing.T, name string) string {
	t.Helper()
	return kubectl(t, "-n", namespace, "get", "ksvc", name, "-o", "jsonpath={.status.latestReadyRevisionName}")
}

// forceToZero takes every pod of a service away, and waits until there is one again for the load: Knative brings it, but for
// the ingress, since an HPA leaves at zero what somebody has put there.
func forceToZero(t *testing.T, name string) {
	t.Helper()
	scale := func(replicas int) {
		kubectl(t, "-n", namespace, "scale", "deployment", "-l", ofService(name), fmt.Sprintf("--replicas=%d", replicas))
	}
	before := map[string]bool{}
	all, err := pods(t.Context(), ofService(name))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		before[p.name] = true
	}
	scale(0)
	if name == "ingress" {
		asleep(t, time.Minute, ofService(name), namespace)
		scale(1)
	}
	until(t, 2*time.Minute, func(ctx context.Context) error {
		all, err := pods(ctx, ofService(name))
		for _, p := range all {
			if !before[p.name] {
				return nil
			}
		}
		return errors.Join(err, fmt.Errorf("%s has no new pod yet", name))
	})
}

// knativeKafkaSource is the program of this test that posts as Knative's KafkaSource does, in the place of our source.
const knativeKafkaSource = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: knative-kafka-source, namespace: %[1]s}
spec:
  selector: {matchLabels: {app: knative-kafka-source}}
  template:
    metadata: {labels: {app: knative-kafka-source, isobar.dev/to-services: "true", isobar.dev/to-kafka: "true"}}
    spec:
      automountServiceAccountToken: false
      containers:
        - name: source
          image: %[2]s
          env:
            - {name: NAMESPACE, value: %[1]s}
            - {name: NAME, value: redis-writer}
            - {name: KAFKA_BOOTSTRAP_SERVERS, value: "weather-kafka-kafka-bootstrap.kafka.svc.cluster.local:9092"}
            - {name: KAFKA_TOPIC, value: message}
            - {name: KAFKA_GROUP_ID, value: isobar-redis-writer}
            - {name: K_SINK, value: "http://redis-writer.%[1]s.svc.cluster.local"}
            - {name: DEAD_LETTER_SINK, value: "http://dead-letter.%[1]s.svc.cluster.local"}
          securityContext:
            runAsNonRoot: true
            allowPrivilegeEscalation: false
            capabilities: {drop: [ALL]}
            seccompProfile: {type: RuntimeDefault}
`

// KafkaSource's ways, by a program that has them: an event by itself in binary mode with its extensions, all of the last
// seconds again after a crash, foreign records wrapped. Everything is counted once, and what can't be is in message.dead
// with the reason.
func TestKafkaSourcesWays(t *testing.T) {
	deployed(t)
	cluster.peers.ours(t, local.KafkaKind)
	if !strings.Contains(" "+strings.Join(containerSources(t), " ")+" ", " kafka-source ") {
		t.Skip("Knative's own KafkaSource is here, and the other tests are about it")
	}
	source := kubectl(t, "-n", namespace, "get", "containersource", "kafka-source", "-o", "json")
	kubectl(t, "-n", namespace, "delete", "containersource", "kafka-source")
	t.Cleanup(func() {
		if out, err := run(context.WithoutCancel(t.Context()), withoutStatus(t, source), "kubectl", "apply", "-f", "-"); err != nil {
			t.Errorf("%v%s", err, out)
		}
		kubectl(t, "-n", namespace, "wait", "containersource", "kafka-source", "--for=condition=Ready", "--timeout=2m")
	})
	apply(t, fmt.Sprintf(knativeKafkaSource, namespace, image(t, "e2e/knative/kafkasource")))
	kubectl(t, "-n", namespace, "rollout", "status", "deployment/knative-kafka-source", "--timeout=2m")

	kafka := kafkaClient(t)
	before := topicEnd(t, kafka, "message.dead")
	producer, err := sarama.NewSyncProducerFromClient(kafka)
	if err != nil {
		t.Fatal(err)
	}
	defer producer.Close()

	const reports, rate, kills = 3000, 200, 3
	l := begins(t.Context(), route(t), reports, rate)
	for i := range kills {
		l.await(t, int64(reports*(i+1)/(kills+1)))
		deletePods(t, "app=knative-kafka-source")
	}
	want := l.end(t)

	// What somebody else has put into the topic: reports, and what is none.
	var records []*sarama.ProducerMessage
	for range 20 {
		records = append(records, &sarama.ProducerMessage{Topic: "message", Value: sarama.StringEncoder(`{"country":"GT","weather":"Sunny"}`)})
	}
	for _, wrong := range []string{`{"country":"Guatemala","weather":"Sunny"}`, "no JSON \x00\xff", ""} {
		records = append(records, &sarama.ProducerMessage{Topic: "message", Value: sarama.StringEncoder(wrong)})
	}
	if err := producer.SendMessages(records); err != nil {
		t.Fatal(err)
	}
	inRedis := counts{want.total + 20, map[string]int{"GT": 20}}
	for country, n := range want.countries {
		inRedis.countries[country] += n
	}
	countedIn(t, 2*time.Minute, map[string]counts{"redis": inRedis, "valkey": want})

	// A letter whose answer was lost may stand there twice.
	for _, letter := range letters(t, kafka, "message.dead", before, 3) {
		header := map[string]string{}
		for _, h := range letter.Headers {
			header[string(h.Key)] = string(h.Value)
		}
		t.Logf("dead letter %q: %v", letter.Value, header)
		for _, name := range []string{"ce_knativeerrordest", "ce_knativeerrorcode", "ce_knativeerrordata", "ce_knativekafkapartition", "ce_knativekafkaoffset"} {
			if header[name] == "" {
				t.Errorf("a dead letter has no %s", name)
			}
		}
		if code := header["ce_knativeerrorcode"]; code != "400" && code != "422" {
			t.Errorf("a dead letter was refused with %s", code)
		}
	}
}

func withoutStatus(t *testing.T, object string) string {
	t.Helper()
	var o struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   struct {
			Name      string            `json:"name"`
			Namespace string            `json:"namespace"`
			Labels    map[string]string `json:"labels,omitempty"`
		} `json:"metadata"`
		Spec json.RawMessage `json:"spec"`
	}
	parse(t, object, &o)
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func kafkaClient(t *testing.T) sarama.Client {
	t.Helper()
	c := sarama.NewConfig()
	c.Version = sarama.V3_0_0_0
	c.Producer.Return.Successes = true
	kafka, err := sarama.NewClient([]string{cluster.peers.servers[local.KafkaKind].Addr()}, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kafka.Close() })
	return kafka
}

// topicEnd is the offset after the last record of a topic with one partition.
func topicEnd(t *testing.T, kafka sarama.Client, topic string) int64 {
	t.Helper()
	offset, err := kafka.GetOffset(topic, 0, sarama.OffsetNewest)
	if err != nil {
		t.Fatal(err)
	}
	return offset
}

// letters waits until so many records have come since an offset.
func letters(t *testing.T, kafka sarama.Client, topic string, from int64, n int) []*sarama.ConsumerMessage {
	t.Helper()
	consumer, err := sarama.NewConsumerFromClient(kafka)
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()
	partition, err := consumer.ConsumePartition(topic, 0, from)
	if err != nil {
		t.Fatal(err)
	}
	defer partition.Close()
	var all []*sarama.ConsumerMessage
	for len(all) < n {
		select {
		case record := <-partition.Messages():
			all = append(all, record)
		case <-time.After(time.Minute):
			t.Fatalf("%d of %d records are in %s", len(all), n, topic)
		}
	}
	return all
}
