package counts_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"isobar.dev/config/local"
	"isobar.dev/counts"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T, dir, name string) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{cert, key, write(t, dir, name+".pem", "CERTIFICATE", der)}
}

// sign makes a certificate and returns the server's lines for it.
func (a *authority) sign(t *testing.T, dir string, until time.Time, ip string) []string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "store"},
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until,
		IPAddresses: []net.IP{net.ParseIP(ip)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	must(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	return []string{
		"tls-cert-file " + write(t, dir, ip+".crt", "CERTIFICATE", der),
		"tls-key-file " + write(t, dir, ip+".key", "PRIVATE KEY", private),
		"tls-ca-cert-file " + a.file,
		"tls-auth-clients no",
	}
}

func write(t *testing.T, dir, name, kind string, der []byte) string {
	path := filepath.Join(dir, name)
	must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	return path
}

func TestTLSAndACLUser(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, k kind) {
		t.Parallel()
		dir := t.TempDir()
		ca, other := newAuthority(t, dir, "ours"), newAuthority(t, dir, "other")
		rights, err := os.ReadFile("rights.acl")
		must(t, err)
		user := "user writer on >secret " + string(rights)
		// A server that answers without TLS at the one port, for those who look, and with TLS at another.
		server := func(until time.Time, ip string) (addr string, p *local.Process) {
			port, err := local.FreePort()
			must(t, err)
			lines := append(ca.sign(t, dir, until, ip), fmt.Sprint("tls-port ", port), user)
			return fmt.Sprint("127.0.0.1:", port), k.server(t, local.Config(lines...))
		}
		addr, p := server(time.Now().Add(time.Hour), "127.0.0.1")
		prefix := strings.ToUpper(k.name)
		right := counts.Settings{Addr: addr, Username: "writer", Password: "secret", TLS: true, CAFile: ca.file}
		with := func(change func(*counts.Settings)) counts.Settings {
			s := right
			change(&s)
			return s
		}
		must(t, k.openWith(t, right, time.Hour).Count(t.Context(), arrivals("tls", 0, 100)))
		expect(t, look(t, p.Addr()), sum(arrivals("tls", 0, 100)))

		misnamed, _ := server(time.Now().Add(time.Hour), "192.0.2.1")
		expired, _ := server(time.Now().Add(-time.Hour), "127.0.0.1")
		for _, c := range []struct {
			name     string
			settings counts.Settings
			lasting  bool
			says     string
		}{
			{"another authority", with(func(s *counts.Settings) { s.CAFile = other.file }), true, prefix + "_CA_FILE must hold the authority"},
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
