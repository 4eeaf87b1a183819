package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"isobar.dev/config/local"
	"isobar.dev/internal/authority"
)

// TestOverTLS runs a system whose programs reach brokers and stores over TLS only, and log in to the brokers.
func TestOverTLS(t *testing.T) {
	ca := authority.New(t)
	cert, key := ca.Sign(t, "127.0.0.1", time.Now().Add(time.Hour))
	options := local.Options{ServerOptions: map[local.Kind][]local.Option{}, Env: map[string][]string{}}
	for _, kind := range local.Kinds {
		port, err := local.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		options.ServerOptions[kind] = []local.Option{local.TLS(port, cert, key), local.User("isobar", "secret")}
		prefix := strings.ToUpper(string(kind)) + "_"
		env := []string{
			fmt.Sprintf("%s=127.0.0.1:%d", local.Variables[kind], port), prefix + "TLS=true", prefix + "CA_FILE=" + ca.File,
		}
		if kind == local.KafkaKind || kind == local.RabbitMQKind {
			env = append(env, prefix+"USERNAME=isobar", prefix+"PASSWORD=secret")
		}
		options.Env[""] = append(options.Env[""], env...)
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
	posted(t, 202, s.URL()+"/reports", sunny)
	counted(t, s, sunnyInGT(1))
}
