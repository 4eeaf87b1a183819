package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	amqp "github.com/Azure/go-amqp"
	"github.com/IBM/sarama"
	"go.yaml.in/yaml/v3"

	"isobar.dev/config/local"
	"isobar.dev/internal/authority"
	"isobar.dev/internal/kafka"
)

// TestAsInProduction runs a system whose programs reach brokers and stores over TLS only, where each logs in as a user with the
// rights that the manifests give, and no others.
func TestAsInProduction(t *testing.T) {
	ca := authority.New(t)
	cert, key := ca.Sign(t, "127.0.0.1", time.Now().Add(time.Hour))
	rights, err := os.ReadFile("../counts/rights.acl")
	if err != nil {
		t.Fatal(err)
	}
	user := local.Config("user isobar on >secret " + string(rights))
	servers := map[local.Kind][]local.Option{
		// Who comes without TLS may do everything in Kafka, and nobody else anything that is not said.
		local.KafkaKind: {local.Login("isobar", "secret"), local.Config(
			"authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer", "super.users=User:ANONYMOUS")},
		local.RabbitMQKind: {local.Account("isobar", "secret", rabbitPermissions(t))},
		local.RedisKind:    {user},
		local.ValkeyKind:   {user},
	}
	options := local.Options{ServerOptions: servers, Servers: map[local.Kind]string{}, Env: map[string][]string{}}
	addrs := map[local.Kind]string{} // where TLS is spoken
	for _, kind := range local.Kinds {
		port, err := local.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		servers[kind] = append(servers[kind], local.TLS(port, cert, key))
		prefix := strings.ToUpper(string(kind)) + "_"
		addrs[kind] = fmt.Sprint("127.0.0.1:", port)
		options.Env[""] = append(options.Env[""], local.Variables[kind]+"="+addrs[kind], prefix+"TLS=true", prefix+"CA_FILE="+ca.File,
			prefix+"USERNAME=isobar", prefix+"PASSWORD=secret")
		if kind == local.KafkaKind { // its rights can't be given before it runs
			options.Servers[kind] = local.StartKafka(t, servers[kind]...).Addr()
			grantKafka(t, options.Servers[kind])
		}
	}
	s, err := local.NewSystem(t.TempDir(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Kill(); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(t.Context(), t.Output()); err != nil {
		t.Fatal(err)
	}

	t.Run("a report is counted", func(t *testing.T) {
		posted(t, 202, s.URL()+"/reports", sunny)
		counted(t, s, sunnyInGT(1))
	})
	client := kafkaClient(t, s)
	t.Run("what can't be counted is kept", func(t *testing.T) {
		const poison = `{"country":"NOWHERE","weather":"Sunny"}`
		producer, err := sarama.NewSyncProducerFromClient(client)
		if err != nil {
			t.Fatal(err)
		}
		defer producer.Close()
		if _, _, err := producer.SendMessage(&sarama.ProducerMessage{Topic: "message", Value: sarama.StringEncoder(poison)}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := queueSender(t, s).Send(ctx, amqp.NewMessage([]byte(poison))); err != nil {
			t.Fatal(err)
		}
		if n := len(take(t, s, "message.dead", 1)); n != 1 {
			t.Errorf("%d dead letters on RabbitMQ", n)
		}
		for ends(t, client, "message.dead")[0] == 0 {
			select {
			case <-ctx.Done():
				t.Fatal("no dead letter on Kafka")
			case <-time.After(10 * time.Millisecond):
			}
		}
	})

	// That is all of it: RabbitMQ's and the stores' limits are proved beside their permissions, Kafka's here.
	limited := kafka.Settings{
		Brokers: []string{addrs[local.KafkaKind]}, TLS: true, CAFile: ca.File, Username: "isobar", Password: "secret",
	}
	for name, attempt := range map[string]func(sarama.Client, sarama.ClusterAdmin) error{
		"dead letters can't be read": func(c sarama.Client, _ sarama.ClusterAdmin) error {
			b, err := c.Leader("message.dead", 0)
			if err != nil {
				return err
			}
			r := &sarama.FetchRequest{Version: 4, MinBytes: 1, MaxBytes: 1 << 20, MaxWaitTime: 100}
			r.AddBlock("message.dead", 0, 0, 1<<20, -1)
			fetched, err := b.Fetch(r)
			if err != nil {
				return err
			}
			return fetched.GetBlock("message.dead", 0).Err
		},
		"another topic can't be seen": func(c sarama.Client, _ sarama.ClusterAdmin) error {
			_, err := c.Partitions("__consumer_offsets")
			return err
		},
		"a topic can't be made": func(_ sarama.Client, a sarama.ClusterAdmin) error {
			return a.CreateTopic("another", &sarama.TopicDetail{NumPartitions: 1, ReplicationFactor: 1}, false)
		},
		"a topic can't be removed": func(_ sarama.Client, a sarama.ClusterAdmin) error { return a.DeleteTopic("message") },
		"another group can't be seen": func(_ sarama.Client, a sarama.ClusterAdmin) error {
			offsets, err := a.ListConsumerGroupOffsets("another", map[string][]int32{"message": {0}})
			if err != nil {
				return err
			}
			return offsets.Err
		},
		"rights can't be given": func(_ sarama.Client, a sarama.ClusterAdmin) error {
			return a.CreateACLs(allow(sarama.AclResourceTopic, "message.dead", sarama.AclOperationRead))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := limited.Config()
			if err != nil {
				t.Fatal(err)
			}
			client, err := sarama.NewClient(limited.Brokers, c)
			if err != nil {
				t.Fatal(err)
			}
			admin, err := sarama.NewClusterAdminFromClient(client)
			if err != nil {
				t.Fatal(err)
			}
			defer admin.Close()
			if err := attempt(client, admin); err == nil || !strings.Contains(err.Error(), "not authorized") {
				t.Errorf("it is not refused for its rights: %v", err)
			}
		})
	}
}

// manifest reads the resources of a file that are of this kind, with their fields' names in any case.
func manifest[Spec any](t *testing.T, file, kind string) []Spec {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var found []Spec
	for documents := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var document map[string]any
		if err := documents.Decode(&document); errors.Is(err, io.EOF) {
			return found
		} else if err != nil {
			t.Fatal(err)
		}
		if document["kind"] != kind {
			continue
		}
		spec, err := json.Marshal(document["spec"])
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, *new(Spec))
		if err := json.Unmarshal(spec, &found[len(found)-1]); err != nil {
			t.Fatal(err)
		}
	}
}

func rabbitPermissions(t *testing.T) local.Permissions {
	t.Helper()
	type permission struct{ Permissions local.Permissions }
	return manifest[permission](t, "../eventing/rabbitmq/topology.yaml", "Permission")[0].Permissions
}

// grantKafka gives isobar the rights that the KafkaUser has.
func grantKafka(t *testing.T, addr string) {
	t.Helper()
	type user struct {
		Authorization struct {
			ACLs []struct {
				Resource   struct{ Type, Name string }
				Operations []string
			}
		}
	}
	c := sarama.NewConfig()
	c.Version = sarama.V3_0_0_0
	admin, err := sarama.NewClusterAdmin([]string{addr}, c)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	types := map[string]sarama.AclResourceType{"topic": sarama.AclResourceTopic, "group": sarama.AclResourceGroup}
	operations := map[string]sarama.AclOperation{
		"Describe": sarama.AclOperationDescribe, "Read": sarama.AclOperationRead, "Write": sarama.AclOperationWrite,
	}
	for _, a := range manifest[user](t, "../eventing/production/kafka/user.yaml", "KafkaUser")[0].Authorization.ACLs {
		for _, name := range a.Operations {
			what, may := types[a.Resource.Type], operations[name]
			if what == 0 || may == 0 {
				t.Fatalf("this test does not know %s of a %s", name, a.Resource.Type)
			}
			if err := admin.CreateACLs(allow(what, a.Resource.Name, may)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// allow is one right of isobar's.
func allow(what sarama.AclResourceType, name string, operation sarama.AclOperation) []*sarama.ResourceAcls {
	return []*sarama.ResourceAcls{{
		Resource: sarama.Resource{ResourceType: what, ResourceName: name, ResourcePatternType: sarama.AclPatternLiteral},
		Acls: []*sarama.Acl{{
			Principal: "User:isobar", Host: "*", Operation: operation, PermissionType: sarama.AclPermissionAllow,
		}},
	}}
}
