package source

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"isobar.dev/config/local"
	"isobar.dev/internal/authority"
	"isobar.dev/internal/kafka"
	"isobar.dev/internal/rabbit"
)

// line is how a broker is called, whichever it is.
type line struct {
	addr           string
	tls            bool
	ca             string
	user, password string
}

func (l line) kafka() kafka.Settings {
	return kafka.Settings{Brokers: []string{l.addr}, TLS: l.tls, CAFile: l.ca, Username: l.user, Password: l.password}
}

func (l line) rabbit() rabbit.Settings {
	return rabbit.Settings{Addr: l.addr, TLS: l.tls, CAFile: l.ca, Username: l.user, Password: l.password}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	const user, password = "isobar", "päss\u00a0word"
	management, err := local.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []struct {
		name, prefix string
		start        func(testing.TB, ...local.Option) *local.Process
		world        func(l, direct line) *world
		anonymous    bool // at the port without TLS
	}{
		{"Kafka", "KAFKA_", func(t testing.TB, options ...local.Option) *local.Process {
			return local.StartKafka(t, append(options, local.Login(user, password))...)
		}, func(l, _ line) *world { return kafkaWorld(l.kafka()) }, true},
		{"RabbitMQ", "RABBITMQ_", func(t testing.TB, options ...local.Option) *local.Process {
			return local.StartRabbitMQ(t, append(options, local.Management(management),
				local.Account(user, password, local.Permissions{Configure: ".*", Write: ".*", Read: ".*"}))...)
		}, func(l, direct line) *world { return rabbitWorld(management, l.rabbit(), direct.rabbit()) }, false},
	} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			ours, other := authority.New(t), authority.New(t)
			cert, key := ours.Sign(t, "127.0.0.1", time.Now().Add(time.Hour))
			port, err := local.FreePort()
			if err != nil {
				t.Fatal(err)
			}
			plain := line{addr: kind.start(t, local.TLS(port, cert, key)).Addr()}
			right := line{fmt.Sprint("127.0.0.1:", port), true, ours.File, user, password}
			with := func(change func(*line)) line {
				l := right
				change(&l)
				return l
			}

			w := kind.world(right, plain)
			for name, test := range map[string]func(*testing.T, *world, string){
				"events arrive as they were, many together": testDelivered,
				"a poison event is dead-lettered alone":     testPoisonNamed,
			} {
				t.Run(name, func(t *testing.T) {
					topic := fmt.Sprintf("tls-%x", time.Now().UnixNano())
					w.create(t, topic)
					w.create(t, topic+".dead")
					test(t, w, topic)
				})
			}
			for _, c := range []struct {
				name string
				line line
				says string // $ is the prefix
				only bool   // of a broker at which nobody need log in
			}{
				{"another authority", with(func(l *line) { l.ca = other.File }), "$CA_FILE must hold the authority", false},
				{"the system's authorities", with(func(l *line) { l.ca = "" }), "$CA_FILE must hold the authority", false},
				{"another name", with(func(l *line) { l.addr = fmt.Sprint("localhost:", port) }), "a name that its certificate holds", false},
				{"a wrong password", with(func(l *line) { l.password = "pass word" }), "$PASSWORD is wrong", false},
				{"a wrong user", with(func(l *line) { l.user = "nobody" }), "$USERNAME", false},
				{"TLS where there is none", with(func(l *line) { l.addr = plain.addr }), "no TLS at this port: unset $TLS", false},
				{"no TLS where there is", with(func(l *line) { l.tls, l.ca = false, "" }), "it may want $TLS", false},
				{"nobody where one must log in", with(func(l *line) { l.user, l.password = "", "" }), "$USERNAME", true},
				{"somebody where nobody logs in", line{plain.addr, false, "", "isobar", "päss\u00a0word"}, "unset $USERNAME", true},
			} {
				if c.only && !kind.anonymous {
					continue
				}
				t.Run(c.name, func(t *testing.T) {
					src := kind.world(c.line, plain).open("message")
					ctx, stop := context.WithCancel(t.Context())
					var running sync.WaitGroup
					running.Go(func() { src.Run(ctx) })
					defer running.Wait()
					defer stop()
					for deadline := time.Now().Add(20 * time.Second); src.State() == notYet; time.Sleep(5 * time.Millisecond) {
						if time.Now().After(deadline) {
							t.Fatal("it says nothing")
						}
					}
					if says := strings.ReplaceAll(c.says, "$", kind.prefix); !strings.Contains(src.State(), says) {
						t.Errorf("it is %q, and not %q", src.State(), says)
					}
				})
			}
		})
	}
}

func TestSettingsThatAreWrong(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		open func() (Source, error)
		says string
	}{
		"Kafka": {func() (Source, error) {
			return NewKafka(KafkaSettings{Settings: kafka.Settings{Brokers: []string{"a:1"}, CAFile: "ca.pem"}})
		}, "KAFKA_TLS must be true"},
		"RabbitMQ": {func() (Source, error) {
			return NewRabbit(RabbitSettings{Settings: rabbit.Settings{Addr: "a:1", CAFile: "ca.pem"}})
		}, "RABBITMQ_TLS must be true"},
	} {
		if _, err := c.open(); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: the error is %v, not %q", name, err, c.says)
		}
	}
}
