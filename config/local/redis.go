package local

import (
	"bufio"
	"context"
	_ "embed"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"isobar.dev/eventing/store"
)

//go:embed redis.conf
var redisConf string

// Redis returns a Redis that keeps its data in dir and listens on 127.0.0.1 at port; 0 picks a free one at the first
// start. It answers a write once it is on disk. It is ready once it answers to PING, so with its data loaded.
func Redis(dir string, port int, options ...Option) *Process {
	return redis(dir, port, "redis", "redis-server", options)
}

// Valkey returns a Valkey; it is to be used as [Redis] is.
func Valkey(dir string, port int, options ...Option) *Process {
	return redis(dir, port, "valkey", "valkey-server", options)
}

func redis(dir string, port int, kind, program string, options []Option) *Process {
	o := gather(dir, kind, options)
	return server(o, port, func(_ context.Context, port int) (Spec, error) {
		tree, err := installedDebian()
		if err != nil {
			return Spec{}, err
		}
		access := "bind " + o.host
		if o.password != "" {
			access += fmt.Sprintf("\nrequirepass %[2]s\nuser %[1]s on >%[2]s ~* &* +@all", o.user, o.password)
		}
		role := ""
		if o.replicaOf != "" {
			role = "replicaof " + strings.Replace(o.replicaOf, ":", " ", 1)
		}
		secure := ""
		if o.tls.port != 0 {
			secure = fmt.Sprintf("tls-port %d\ntls-cert-file %s\ntls-key-file %s\ntls-auth-clients no", o.tls.port, o.tls.cert, o.tls.key)
		}
		config, err := o.writeOnce(o.kind+".conf", store.Config, redisConf, access, role, secure, o.additions())
		return Spec{
			Path:  filepath.Join(tree.bin, program),
			Args:  []string{config, "--port", strconv.Itoa(port), "--dir", o.dir},
			Ready: o.ping(port),
		}, err
	})
}

// Sentinel returns a Redis Sentinel that keeps its state in dir, listens on 127.0.0.1 at port (0 picks a free one) and
// watches the master at addr (host:port) under a name. On its own it is the quorum: a master that does not answer for a
// second is failed over to one of its replicas.
func Sentinel(dir string, port int, name, addr string, options ...Option) *Process {
	o := gather(dir, "sentinel", options)
	return server(o, port, func(_ context.Context, port int) (Spec, error) {
		tree, err := installedDebian()
		if err != nil {
			return Spec{}, err
		}
		config, err := o.writeOnce(o.kind+".conf", fmt.Sprintf(`bind %[1]s
sentinel monitor %[2]s %[3]s 1
sentinel down-after-milliseconds %[2]s 1000
sentinel failover-timeout %[2]s 5000
`, o.host, name, strings.Replace(addr, ":", " ", 1)), o.additions())
		return Spec{
			Path:  filepath.Join(tree.bin, "redis-server"),
			Args:  []string{config, "--sentinel", "--port", strconv.Itoa(port), "--dir", o.dir},
			Ready: o.ping(port),
		}, err
	})
}

// RedisCLI returns the name of a redis-cli, which works with Valkey as well: this machine's, else the path of the one that
// came with Redis, else nothing.
func RedisCLI() string {
	if found("redis-cli")() {
		return "redis-cli"
	}
	if tree, err := installedDebian(); err == nil {
		return filepath.Join(tree.bin, "redis-cli")
	}
	return ""
}

// ping asks a Redis or Valkey whether it can answer: while it loads its data it answers with an error.
func (s *settings) ping(port int) func(context.Context) error {
	return func(ctx context.Context) error {
		c, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", net.JoinHostPort(s.host, strconv.Itoa(port)))
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(dialTimeout))
		ask := bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c))
		if s.password != "" {
			fmt.Fprintf(ask, "AUTH %s\r\n", s.password)
		}
		fmt.Fprintf(ask, "PING\r\n")
		if err := ask.Flush(); err != nil {
			return err
		}
		if s.password != "" {
			if _, err := ask.ReadString('\n'); err != nil {
				return err
			}
		}
		line, err := ask.ReadString('\n')
		if err == nil && !strings.HasPrefix(line, "+PONG") {
			err = fmt.Errorf("PING answered %q", strings.TrimSpace(line))
		}
		return err
	}
}
