package local

import (
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/IBM/sarama"
)

//go:embed kafka.properties
var kafkaProperties string

//go:embed kafka.log4j2.properties
var kafkaLogging []byte

// KafkaTopics are created when a Kafka starts without them: name and partitions.
var KafkaTopics = map[string]int32{"message": 8, "message.dead": 1}

// maxDeadLetter is the largest record that message.dead takes, in bytes: a dead letter is the largest that message takes,
// 1 MiB, with the reason, and data that is no JSON may have grown by a third.
const maxDeadLetter = "2097152"

// Kafka returns a single Kafka broker, in KRaft mode, that keeps its data in dir and listens on 127.0.0.1 at port; 0 picks
// a free one at the first start. It is ready once every one of [KafkaTopics] is there and has a leader.
func Kafka(dir string, port int, options ...Option) *Process {
	o := gather(dir, "kafka", options)
	controller := 0
	return server(o, port, func(_ context.Context, port int) (Spec, error) {
		home, err := kafkaTree.path()
		if err != nil {
			return Spec{}, err
		}
		if controller == 0 {
			if controller, err = FreePort(); err != nil {
				return Spec{}, err
			}
		}
		data := filepath.Join(o.dir, "data")
		if err := copyFormatted(filepath.Join(home, "formatted"), data); err != nil {
			return Spec{}, err
		}
		addr := net.JoinHostPort(o.host, strconv.Itoa(port))
		secure, err := o.kafkaTLS(addr, controller)
		if err != nil {
			return Spec{}, err
		}
		config, err := o.write("kafka.properties", kafkaProperties, kafkaPlaces(data, addr, controller), secure, o.additions())
		if err != nil {
			return Spec{}, err
		}
		logging, err := o.write("log4j2.properties", string(kafkaLogging))
		if err != nil {
			return Spec{}, err
		}
		return Spec{
			Path: filepath.Join(home, "java"),
			Args: []string{
				"-Xms256m", "-Xmx512m",
				"-XX:+UseParallelGC", // on two cores G1's own threads take more from the broker than they save it
				"-Djava.awt.headless=true", "-Djava.net.preferIPv4Stack=true",
				"-Dlog4j2.configurationFile=" + logging,
				"-cp", filepath.Join(home, "lib", "*"), "kafka.Kafka", config,
			},
			Ready: func(ctx context.Context) error { return o.kafkaReady(ctx, addr) },
		}, nil
	})
}

func kafkaPlaces(data, addr string, controller int) string {
	return fmt.Sprintf(`
listeners=PLAINTEXT://%[1]s,CONTROLLER://%[2]s:%[3]d
advertised.listeners=PLAINTEXT://%[1]s,CONTROLLER://%[2]s:%[3]d
controller.quorum.voters=1@%[2]s:%[3]d
log.dirs=%[4]s
`, addr, loopback, controller, data)
}

// kafkaTLS are the lines for the TLS port, if there is to be one.
func (s *settings) kafkaTLS(addr string, controller int) (string, error) {
	if s.tls.port == 0 {
		return "", nil
	}
	cert, err := os.ReadFile(s.tls.cert)
	if err != nil {
		return "", err
	}
	key, err := os.ReadFile(s.tls.key)
	if err != nil {
		return "", err
	}
	store, err := s.write("keystore.pem", string(key), string(cert)) // Kafka wants both in one file
	if err != nil {
		return "", err
	}
	return fmt.Sprintf(`
listeners=PLAINTEXT://%[1]s,CONTROLLER://%[6]s:%[3]d,SASL_SSL://%[2]s:%[4]d
advertised.listeners=PLAINTEXT://%[1]s,CONTROLLER://%[6]s:%[3]d,SASL_SSL://%[2]s:%[4]d
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL
ssl.keystore.type=PEM
ssl.keystore.location=%[5]s
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
`, addr, s.host, controller, s.tls.port, store, loopback), nil
}

// formatKafka makes dir the data of an empty Kafka.
func formatKafka(ctx context.Context, home, dir string) error {
	config := filepath.Join(home, "format.properties")
	text := kafkaProperties + kafkaPlaces(dir, net.JoinHostPort(loopback, "9092"), 9093)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return err
	}
	const cluster = "aXNvYmFyLWxvY2FsLWtma2" // any 16 bytes
	out, err := exec.CommandContext(ctx, filepath.Join(home, "java"), "-cp", filepath.Join(home, "lib", "*"),
		"kafka.tools.StorageTool", "format", "--cluster-id", cluster, "--config", config).CombinedOutput()
	if err != nil {
		return fmt.Errorf("format Kafka's storage: %w\n%s", err, out)
	}
	return nil
}

// copyFormatted makes data a copy of an empty Kafka's, unless it is there.
func copyFormatted(formatted, data string) error {
	if _, err := os.Stat(data); err == nil {
		return nil
	}
	unfinished := data + ".unfinished"
	if err := os.RemoveAll(unfinished); err != nil {
		return err
	}
	if err := os.CopyFS(unfinished, os.DirFS(formatted)); err != nil {
		return err
	}
	return os.Rename(unfinished, data)
}

// kafkaReady creates what is missing, the topics and the user, and returns nil once all topics have leaders.
func (s *settings) kafkaReady(ctx context.Context, addr string) error {
	if err := connects(ctx, addr); err != nil {
		return err // cheaper than what follows
	}
	config := sarama.NewConfig()
	config.Version = sarama.V4_0_0_0
	config.Net.DialTimeout, config.Net.ReadTimeout, config.Net.WriteTimeout = dialTimeout, dialTimeout, dialTimeout
	config.Metadata.Retry.Max = 0
	config.Admin.Retry.Max = 0
	admin, err := sarama.NewClusterAdmin([]string{addr}, config)
	if err != nil {
		return err
	}
	defer admin.Close()
	if s.user != "" {
		_, err := admin.UpsertUserScramCredentials([]sarama.AlterUserScramCredentialsUpsert{{
			Name: s.user, Password: []byte(s.password),
			Mechanism: sarama.SCRAM_MECHANISM_SHA_512, Iterations: 4096, Salt: []byte(rand.Text()),
		}})
		if err != nil {
			return fmt.Errorf("create user %q: %w", s.user, err)
		}
	}
	var names []string
	for name, partitions := range KafkaTopics {
		names = append(names, name)
		topic := &sarama.TopicDetail{NumPartitions: partitions, ReplicationFactor: 1}
		if limit := maxDeadLetter; strings.HasSuffix(name, ".dead") {
			topic.ConfigEntries = map[string]*string{"max.message.bytes": &limit}
		}
		err := admin.CreateTopic(name, topic, false)
		if err != nil && !errors.Is(err, sarama.ErrTopicAlreadyExists) {
			return fmt.Errorf("create topic %q: %w", name, err)
		}
	}
	topics, err := admin.DescribeTopics(names)
	if err != nil {
		return err
	}
	var waiting []string
	for _, t := range topics {
		if t.Err != sarama.ErrNoError {
			waiting = append(waiting, t.Name)
		}
		for _, p := range t.Partitions {
			if p.Err != sarama.ErrNoError || p.Leader < 0 {
				waiting = append(waiting, fmt.Sprintf("%s/%d", t.Name, p.ID))
			}
		}
	}
	if len(waiting) > 0 {
		return fmt.Errorf("no leader yet for %s", strings.Join(waiting, ", "))
	}
	return nil
}
