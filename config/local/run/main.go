// Command run starts all of Isobar on this machine and runs it until it is told to end: it is `make run`.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"isobar.dev/config/local"
)

func main() {
	install := flag.Bool("install", false, "only install the servers, and start nothing")
	dir := flag.String("dir", ".isobar", "the directory for data, logs and programs")
	flag.Parse()

	ctx, told := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	var err error
	if *install {
		err = local.Install(ctx, os.Stdout)
	} else {
		err = run(ctx, told, *dir)
	}
	told()
	if err != nil {
		fmt.Fprintln(os.Stderr, "\n"+err.Error())
		os.Exit(1)
	}
}

// run runs everything until ctx ends. From then on a second signal ends this process, and with it all others.
func run(ctx context.Context, told func(), dir string) error {
	options, err := fromEnvironment()
	if err != nil {
		return err
	}
	system, err := local.NewSystem(dir, options)
	if err != nil {
		return err
	}
	err = system.Start(ctx, os.Stdout)
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	fmt.Print(welcome(system, dir))
	<-ctx.Done()
	told()
	fmt.Println("\nstopping")
	stop, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return system.Stop(stop)
}

// fromEnvironment reads the addresses of servers to be used instead, and the ports.
func fromEnvironment() (local.Options, error) {
	o := local.Options{Restart: true, Servers: map[local.Kind]string{}, Ports: map[string]int{}}
	for kind, variable := range local.Variables {
		if addr := os.Getenv(variable); addr != "" {
			o.Servers[kind] = addr
		}
	}
	for name, port := range local.DefaultPorts {
		o.Ports[name] = port
		variable := local.PortVariable(name)
		text := os.Getenv(variable)
		if text == "" {
			continue
		}
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return o, fmt.Errorf("%s=%s: a port is a number from 1 to 65535", variable, text)
		}
		o.Ports[name] = int(n)
	}
	return o, nil
}

func welcome(s *local.System, dir string) string {
	kafka, rabbit := string(local.KafkaKind), string(local.RabbitMQKind)
	redis, valkey := string(local.RedisKind), string(local.ValkeyKind)
	return fmt.Sprintf(`
Isobar runs.
  ingress    http://%s      publisher  http://%s and gRPC %s
  Kafka      %-26s RabbitMQ   %s
  Redis      %-26s Valkey     %s
  logs       %s/log/NAME.log

Report some weather:
  curl -i %s/reports -H 'content-type: application/json' \
    -d '{"description":"Test","country":"GT","weather":"Sunny"}'

See it counted, in Redis by way of Kafka and in Valkey by way of RabbitMQ:
  %s
  %s

Ctrl-C stops everything; the data stays in %s/data until make clean.
`, s.Addr(local.Ingress), s.Addr(local.Publisher), s.Addr(local.PublisherGRPC),
		s.Addr(kafka), s.Addr(rabbit), s.Addr(redis), s.Addr(valkey), dir,
		strings.Replace(s.Addr(local.Ingress), "127.0.0.1", "localhost", 1), count(s.Addr(redis)), count(s.Addr(valkey)), dir)
}

// count is the command that shows how often Guatemala was reported.
func count(addr string) string {
	command := cmp.Or(local.RedisCLI(), "redis-cli")
	if h, port, err := net.SplitHostPort(addr); err == nil {
		if h != "127.0.0.1" {
			command += " -h " + h
		}
		command += " -p " + port
	}
	return command + " hget country:counts GT"
}
