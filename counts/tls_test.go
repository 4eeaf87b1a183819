package counts_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"isobar.dev/config/local"
	"isobar.dev/counts"
	"isobar.dev/internal/authority"
)

func TestTLSAndACLUser(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, k kind) {
		t.Parallel()
		ca, other := authority.New(t), authority.New(t)
		rights, err := os.ReadFile("rights.acl")
		must(t, err)
		user := "user writer on >secret " + string(rights)
		// A server that answers without TLS at the one port, for those who look, and with TLS at another.
		server := func(until time.Time, ip string) (addr string, p *local.Process) {
			port, err := local.FreePort()
			must(t, err)
			cert, key := ca.Sign(t, ip, until)
			return fmt.Sprint("127.0.0.1:", port), k.server(t, local.TLS(port, cert, key), local.Config(user))
		}
		addr, p := server(time.Now().Add(time.Hour), "127.0.0.1")
		prefix := strings.ToUpper(k.name)
		right := counts.Settings{Addr: addr, Username: "writer", Password: "secret", TLS: true, CAFile: ca.File}
		with := func(change func(*counts.Settings)) counts.Settings {
			s := right
			change(&s)
			return s
		}
		must(t, k.openWith(t, right, time.Hour).Count(t.Context(), arrivals("tls", 0, 100)))
		expect(t, look(t, p.Addr()), sum(arrivals("tls", 0, 100)))

		t.Run("an authority that is renewed is known without a restart", func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "ca.pem")
			other.Copy(t, file)
			store := k.openWith(t, with(func(s *counts.Settings) { s.CAFile = file }), time.Hour)
			fails(t, store.Count(t.Context(), arrivals("refused", 0, 1)), true, prefix+"_CA_FILE")
			ca.Copy(t, file)
			must(t, store.Count(t.Context(), arrivals("tls", 0, 1))) // which has been counted before
		})
		misnamed, _ := server(time.Now().Add(time.Hour), "192.0.2.1")
		expired, _ := server(time.Now().Add(-time.Hour), "127.0.0.1")
		for _, c := range []struct {
			name     string
			settings counts.Settings
			lasting  bool
			says     string
		}{
			{"another authority", with(func(s *counts.Settings) { s.CAFile = other.File }), true, prefix + "_CA_FILE must hold the authority"},
			{"the system's authorities", with(func(s *counts.Settings) { s.CAFile = "" }), true, prefix + "_CA_FILE must hold the authority"},
			{"another name", with(func(s *counts.Settings) { s.Addr = misnamed }), true, "a name that its certificate holds"},
			{"an expired certificate", with(func(s *counts.Settings) { s.Addr = expired }), true, "must be renewed"},
			{"a wrong password", with(func(s *counts.Settings) { s.Password = "wrong" }), true, prefix + "_PASSWORD is wrong"},
			{"a wrong user", with(func(s *counts.Settings) { s.Username = "nobody" }), true, prefix + "_USERNAME"},
			{"TLS where there is none", with(func(s *counts.Settings) { s.Addr = p.Addr() }), false, "unset " + prefix + "_TLS"},
			{"no TLS where there is", counts.Settings{Addr: addr}, false, prefix + "_TLS"},
		} {
			t.Run(c.name, func(t *testing.T) {
				fails(t, k.openWith(t, c.settings, time.Hour).Count(t.Context(), arrivals("refused", 0, 1)), c.lasting, c.says)
			})
		}
		expect(t, look(t, p.Addr()), sum(arrivals("tls", 0, 100)))
	})
}

func TestOpenNamesTheVariableThatIsWrong(t *testing.T) {
	dir := t.TempDir()
	noPEM := filepath.Join(dir, "no.pem")
	must(t, os.WriteFile(noPEM, []byte("no certificate"), 0o600))
	for _, c := range []struct {
		name     string
		settings counts.Settings
		window   time.Duration
		says     string
	}{
		{"no address", counts.Settings{}, time.Hour, "REDIS_ADDR is not set"},
		{"an address without a port", counts.Settings{Addr: "redis"}, time.Hour, "REDIS_ADDR must be HOST:PORT"},
		{"an address without a host", counts.Settings{Addr: ":6379"}, time.Hour, "REDIS_ADDR must be HOST:PORT"},
		{"an address and Sentinels", counts.Settings{Addr: "a:1", SentinelAddrs: []string{"b:1"}, SentinelMaster: "m"}, time.Hour, "REDIS_ADDR must not be set beside REDIS_SENTINEL_ADDRS"},
		{"Sentinels without a master", counts.Settings{SentinelAddrs: []string{"b:1"}}, time.Hour, "REDIS_SENTINEL_MASTER"},
		{"a master without Sentinels", counts.Settings{Addr: "a:1", SentinelMaster: "m"}, time.Hour, "REDIS_SENTINEL_MASTER"},
		{"a Sentinel without a port", counts.Settings{SentinelAddrs: []string{"b:1", "c"}, SentinelMaster: "m"}, time.Hour, "REDIS_SENTINEL_ADDRS must be"},
		{"a user without a password", counts.Settings{Addr: "a:1", Username: "u"}, time.Hour, "REDIS_PASSWORD is not set"},
		{"an authority without TLS", counts.Settings{Addr: "a:1", CAFile: noPEM}, time.Hour, "REDIS_TLS must be true"},
		{"an authority that is not there", counts.Settings{Addr: "a:1", TLS: true, CAFile: dir + "/none"}, time.Hour, "REDIS_CA_FILE can't be read"},
		{"an authority that is none", counts.Settings{Addr: "a:1", TLS: true, CAFile: noPEM}, time.Hour, "REDIS_CA_FILE must be certificates"},
		{"fewer than no replicas", counts.Settings{Addr: "a:1", MinReplicas: -1}, time.Hour, "REDIS_MIN_REPLICAS"},
		{"no window", counts.Settings{Addr: "a:1"}, 0, "DEDUPE_WINDOW"},
		{"a window that never ends", counts.Settings{Addr: "a:1"}, 1 << 62, "DEDUPE_WINDOW"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := counts.Open("redis", c.settings, c.window)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("the error is %v, not %q", err, c.says)
			}
		})
	}
}
