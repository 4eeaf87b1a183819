package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"isobar.dev/config/local"
	"isobar.dev/internal/authority"
	"isobar.dev/internal/kafka"
	"isobar.dev/internal/peer"
	"isobar.dev/internal/rabbit"
)

// line is how a broker is called, whichever it is.
type line struct {
	addr           string
	tls            bool
	ca             string
	user, password string
}

func TestTLS(t *testing.T) {
	for _, kind := range []struct {
		name, prefix string
		start        func(testing.TB, ...local.Option) *local.Process
		open         func(line) (Broker, error)
		anonymous    bool // at the port without TLS
	}{
		{"Kafka", "KAFKA_", local.StartKafka, func(l line) (Broker, error) {
			return newKafka(kafka.Settings{Brokers: []string{l.addr}, TLS: l.tls, CAFile: l.ca, Username: l.user, Password: l.password}, "message")
		}, true},
		{"RabbitMQ", "RABBITMQ_", local.StartRabbitMQ, func(l line) (Broker, error) {
			return newRabbitMQ(rabbit.Settings{Addr: l.addr, TLS: l.tls, CAFile: l.ca, Username: l.user, Password: l.password}, "message")
		}, false},
	} {
		t.Run(kind.name, func(t *testing.T) {
			log := captureLog(t)
			ours, other := authority.New(t), authority.New(t)
			cert, key := ours.Sign(t, "127.0.0.1", time.Now().Add(time.Hour))
			port := freePort(t)
			plain := kind.start(t, local.TLS(port, cert, key), local.Login("isobar", "päss\u00a0word")).Addr()
			right := line{fmt.Sprint("127.0.0.1:", port), true, ours.File, "isobar", "päss\u00a0word"}
			with := func(change func(*line)) line {
				l := right
				change(&l)
				return l
			}
			open := func(t *testing.T, l line) Broker {
				b := opened(kind.open(l))
				t.Cleanup(b.Close)
				return b
			}

			t.Run("what it confirms over TLS is stored", func(t *testing.T) {
				insist(t, open(t, right), reports("tls", 1000)...)
			})
			t.Run("an authority that is renewed is known without a restart", func(t *testing.T) {
				file := filepath.Join(t.TempDir(), "ca.pem")
				other.Copy(t, file)
				b := open(t, with(func(l *line) { l.ca = file }))
				away(t, b, kind.prefix+"CA_FILE")
				ours.Copy(t, file)
				insist(t, b, reports("renewed", 1)...)
			})
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
				{"TLS where there is none", with(func(l *line) { l.addr = plain }), "no TLS at this port: unset $TLS", false},
				{"no TLS where there is", with(func(l *line) { l.tls, l.ca = false, "" }), "it may want $TLS", false},
				{"nobody where one must log in", with(func(l *line) { l.user, l.password = "", "" }), "$USERNAME", true},
				{"somebody where nobody logs in", line{plain, false, "", "isobar", "päss\u00a0word"}, "unset $USERNAME", true},
			} {
				if c.only && !kind.anonymous {
					continue
				}
				t.Run(c.name, func(t *testing.T) {
					says := strings.ReplaceAll(c.says, "$", kind.prefix)
					brokers := every{"it": open(t, c.line)}
					away(t, brokers, says)
					start := time.Now()
					err := publish(brokers, 10*time.Second, reports("refused", 1)...)
					if err == nil || !strings.Contains(err.Error(), says) || time.Since(start) > time.Second {
						t.Errorf("publishing ends after %v with %v", time.Since(start), err)
					}
					if state := brokers.peers()["it"]; !strings.Contains(state, says) {
						t.Errorf("its state is %q", state)
					}
					log.await(t, "is away", says)
				})
			}
		})
	}
}

// away waits until a broker is away for a reason.
func away(t *testing.T, b Broker, says string) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if err = b.Err(); err != nil && !errors.Is(err, peer.ErrConnecting) {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), says) {
		t.Errorf("the error is %v, not %q", err, says)
	}
}

// logged is what the program's log says.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func captureLog(t *testing.T) *logged {
	l := new(logged)
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(l, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	return l
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// await waits for a line with all the words, and forgets what was said.
func (l *logged) await(t *testing.T, words ...string) {
	t.Helper()
	var said string
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		l.mu.Lock()
		said = l.text.String()
		l.mu.Unlock()
		for line := range strings.Lines(said) {
			found := true
			for _, word := range words {
				found = found && strings.Contains(line, word)
			}
			if found {
				l.mu.Lock()
				l.text.Reset()
				l.mu.Unlock()
				return
			}
		}
	}
	t.Errorf("no line of the log says %q:\n%s", words, said)
}

func TestSettingsThatAreWrong(t *testing.T) {
	right := settings{Topic: "message", Queue: "message"}
	right.Kafka.Brokers, right.RabbitMQ.Addr = []string{"a:1"}, "a:1"
	noPEM := filepath.Join(t.TempDir(), "no.pem")
	if err := os.WriteFile(noPEM, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*settings)
		says   string
	}{
		{"Kafka without a port", func(s *settings) { s.Kafka.Brokers = []string{"a:1", "b"} }, "KAFKA_BOOTSTRAP_SERVERS must be HOST:PORT"},
		{"Kafka, a user without a password", func(s *settings) { s.Kafka.Username = "u" }, "KAFKA_USERNAME and KAFKA_PASSWORD must be set together"},
		{"Kafka, a password without a user", func(s *settings) { s.Kafka.Password = "p" }, "KAFKA_USERNAME and KAFKA_PASSWORD must be set together"},
		{"Kafka, an authority without TLS", func(s *settings) { s.Kafka.CAFile = noPEM }, "KAFKA_TLS must be true"},
		{"Kafka, an authority that is not there", func(s *settings) { s.Kafka.TLS, s.Kafka.CAFile = true, noPEM+"x" }, "KAFKA_CA_FILE can't be read"},
		{"Kafka, an authority that is none", func(s *settings) { s.Kafka.TLS, s.Kafka.CAFile = true, noPEM }, "KAFKA_CA_FILE must be certificates"},
		{"RabbitMQ without a port", func(s *settings) { s.RabbitMQ.Addr = "b" }, "RABBITMQ_ADDR must be HOST:PORT"},
		{"RabbitMQ, a user without a password", func(s *settings) { s.RabbitMQ.Username = "u" }, "RABBITMQ_USERNAME and RABBITMQ_PASSWORD must be set together"},
		{"RabbitMQ, a password without a user", func(s *settings) { s.RabbitMQ.Password = "p" }, "RABBITMQ_USERNAME and RABBITMQ_PASSWORD must be set together"},
		{"RabbitMQ, an authority without TLS", func(s *settings) { s.RabbitMQ.CAFile = noPEM }, "RABBITMQ_TLS must be true"},
		{"RabbitMQ, an authority that is not there", func(s *settings) { s.RabbitMQ.TLS, s.RabbitMQ.CAFile = true, noPEM+"x" }, "RABBITMQ_CA_FILE can't be read"},
		{"RabbitMQ, an authority that is none", func(s *settings) { s.RabbitMQ.TLS, s.RabbitMQ.CAFile = true, noPEM }, "RABBITMQ_CA_FILE must be certificates"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := right
			c.change(&s)
			if _, err := build(t.Context(), s); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("the error is %v, not %q", err, c.says)
			}
		})
	}
}
