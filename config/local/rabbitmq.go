package local

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/Azure/go-amqp"

	definitions "isobar.dev/eventing/rabbitmq"
)

//go:embed rabbitmq.conf
var rabbitConf string

//go:embed rabbitmq.advanced.config
var rabbitAdvanced string

// RabbitUser and RabbitPassword are RabbitMQ's usual ones; it takes them from loopback only.
const (
	RabbitUser     = "guest"
	RabbitPassword = "guest"
)

// rabbitFlags are the Erlang machine's.
var rabbitFlags = []string{
	"+S", "2:2", // as many schedulers as the two cores that everything here is measured on
	"+sbwt", "none", "+sbwtdcpu", "none", "+sbwtdio", "none", // an idle scheduler sleeps; spinning takes the core from others
	"+W", "w", "+P", "1048576", "+t", "5000000", "+pc", "unicode",
	"+MBas", "ageffcbf", "+MHas", "ageffcbf", "+MBlmbcs", "512", "+MHlmbcs", "512", "+MMmcs", "30", // as RabbitMQ's own script
	"-syslog", "logger", "[]", "-syslog", "syslog_error_logger", "false",
	"-kernel", "prevent_overlapping_partitions", "false",
	// These would be three helper processes, and RabbitMQ measures memory and disk itself.
	"-os_mon", "start_cpu_sup", "false", "-os_mon", "start_disksup", "false", "-os_mon", "start_memsup", "false",
	// A node with a name but without distribution: it needs no epmd and opens no port for other nodes. RabbitMQ asks what
	// port that is all the same, and is told one.
	"-sname", "isobar@localhost", "-start_epmd", "false", "-dist_listen", "false", "-erl_epmd_port", "1",
}

// RabbitMQ returns a single RabbitMQ node that keeps its data in dir and listens on 127.0.0.1 at port; 0 picks a free one
// at the first start. Its exchange and queues are those of eventing/rabbitmq, its user is [RabbitUser]. It is ready once
// the queue "message" can be attached to over AMQP 1.0. There is no epmd, no Erlang distribution and so no rabbitmqctl.
func RabbitMQ(dir string, port int, options ...Option) *Process {
	o := gather(dir, "rabbitmq", options)
	return server(o, port, func(_ context.Context, port int) (Spec, error) {
		tree, err := installedDebian()
		if err != nil {
			return Spec{}, err
		}
		if err := o.writeRabbit(port); err != nil {
			return Spec{}, err
		}
		erlang, home := filepath.Join(tree.root, "usr/lib/erlang"), filepath.Join(tree.root, tree.home)
		return Spec{
			Path: filepath.Join(tree.bin, "erlexec"),
			Args: append([]string{"-noinput", "-s", "rabbit", "boot", "-boot", "start_sasl"}, rabbitFlags...),
			Env: []string{
				"ROOTDIR=" + erlang, "BINDIR=" + tree.bin, "EMU=beam", "PROGNAME=erl", "ERL_LIBS=" + filepath.Join(home, "plugins"),
				"HOME=" + o.dir, "LANG=C.UTF-8", "ERL_CRASH_DUMP=" + filepath.Join(o.dir, "erl_crash.dump"),
				"ERL_MAX_PORTS=65536", "ERL_MAX_ETS_TABLES=50000",
				"ERL_EPMD_ADDRESS=" + loopback, "ERL_EPMD_PORT=1", // nobody is there: another's epmd must not hear of this node
				"RABBITMQ_HOME=" + home, "RABBITMQ_NODENAME=isobar@localhost", "RABBITMQ_BASE=" + o.dir,
				"RABBITMQ_MNESIA_BASE=" + filepath.Join(o.dir, "data"), "RABBITMQ_LOGS=-",
				"RABBITMQ_LOG_BASE=" + o.dir, "RABBITMQ_GENERATED_CONFIG_DIR=" + filepath.Join(o.dir, "generated"),
				"RABBITMQ_CONFIG_FILE=" + filepath.Join(o.dir, "rabbitmq.conf"),
				"RABBITMQ_ADVANCED_CONFIG_FILE=" + filepath.Join(o.dir, "advanced.config"),
				"RABBITMQ_ENABLED_PLUGINS_FILE=" + filepath.Join(o.dir, "enabled_plugins"),
			},
			Dir: o.dir,
			Ready: func(ctx context.Context) error {
				if err := o.rabbitReady(ctx, net.JoinHostPort(o.host, strconv.Itoa(port))); err != nil {
					return err
				}
				return o.queuesOnDisk()
			},
		}, nil
	})
}

func (s *settings) writeRabbit(port int) error {
	imports := filepath.Join(s.dir, "definitions")
	if err := os.MkdirAll(imports, 0o755); err != nil {
		return err
	}
	places := fmt.Sprintf("listeners.tcp.1 = %s:%d\ndefinitions.import_backend = local_filesystem\ndefinitions.local.path = %s\n",
		s.host, port, imports)
	var plugins []string
	if s.management != 0 {
		plugins = append(plugins, "rabbitmq_management")
		places += fmt.Sprintf("management.tcp.ip = %s\nmanagement.tcp.port = %d\n", loopback, s.management)
		places += "management_agent.disable_metrics_collector = false\ncollect_statistics = coarse\n"
	}
	if s.tls.port != 0 {
		places += fmt.Sprintf("listeners.ssl.1 = %s:%d\nssl_options.certfile = %s\nssl_options.keyfile = %s\nssl_options.verify = verify_none\n",
			s.host, s.tls.port, s.tls.cert, s.tls.key)
	}
	// With definitions to import, RabbitMQ leaves its default user out. They can't name it: they are the cluster's too.
	var users, permissions []any
	add := func(a account, tag string) {
		users = append(users, map[string]any{"name": a.name, "password": a.password, "tags": tag})
		permissions = append(permissions, map[string]any{
			"user": a.name, "vhost": "/", "configure": a.may.Configure, "write": a.may.Write, "read": a.may.Read,
		})
	}
	name, password := s.rabbitLogin()
	add(account{name, password, Permissions{".*", ".*", ".*"}}, "administrator")
	for _, a := range s.accounts {
		add(a, "")
	}
	accounts, err := json.Marshal(map[string]any{
		"users": users, "vhosts": []any{map[string]any{"name": "/"}}, "permissions": permissions,
	})
	if err != nil {
		return err
	}
	for name, text := range map[string]string{
		"rabbitmq.conf":              rabbitConf + places + s.additions(),
		"advanced.config":            rabbitAdvanced,
		"enabled_plugins":            "[" + strings.Join(plugins, ",") + "].\n",
		"definitions/1-user.json":    string(accounts),
		"definitions/2-message.json": string(definitions.Definitions),
	} {
		if _, err := s.write(name, text); err != nil {
			return err
		}
	}
	return nil
}

// queuesOnDisk tells whether the names of the queues' logs are on disk. RabbitMQ writes them up to a second late: when it is
// killed before that, it does not find a queue's log again, and the queue has lost what it confirmed and never has a
// leader.
func (s *settings) queuesOnDisk() error {
	var defined struct{ Queues []struct{ Name string } }
	if err := json.Unmarshal(definitions.Definitions, &defined); err != nil {
		return err
	}
	var names []byte
	files, _ := filepath.Glob(filepath.Join(s.dir, "data", "*", "quorum", "*", "names.dets"))
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		names = append(names, b...)
	}
	for _, q := range defined.Queues {
		name := "%2F_" + q.Name
		atom := append([]byte{'w', byte(len(name))}, name...) // as Erlang writes a term
		if !bytes.Contains(names, atom) {
			return fmt.Errorf("the name of queue %q is not on disk yet", q.Name)
		}
	}
	return nil
}

// rabbitLogin is the administrator's name and password.
func (s *settings) rabbitLogin() (name, password string) {
	return cmp.Or(s.user, RabbitUser), cmp.Or(s.password, RabbitPassword)
}

func (s *settings) rabbitReady(ctx context.Context, addr string) error {
	if err := connects(ctx, addr); err != nil {
		return err // cheaper than what follows
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, err := amqp.Dial("amqp://"+addr, amqp.ConnSASLPlain(s.rabbitLogin()), amqp.ConnConnectTimeout(dialTimeout))
	if err != nil {
		return err
	}
	defer c.Close()
	session, err := c.NewSession()
	if err != nil {
		return err
	}
	sender, err := session.NewSender(amqp.LinkTargetAddress("/queues/message"))
	if err != nil {
		return fmt.Errorf(`attach to queue "message": %w`, err)
	}
	return sender.Close(ctx)
}
