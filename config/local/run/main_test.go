package main

import (
	"strings"
	"testing"

	"isobar.dev/config/local"
)

func TestFromEnvironment(t *testing.T) {
	for name, c := range map[string]struct {
		variable, value string
		ok              func(local.Options) bool // nil: an error that names the variable
	}{
		"a server that is given is used instead": {
			"REDIS_ADDR", "redis.test:7000",
			func(o local.Options) bool {
				return o.Servers[local.RedisKind] == "redis.test:7000" && o.Servers[local.ValkeyKind] == ""
			},
		},
		"a port can be changed": {
			"PUBLISHER_GRPC_PORT", "50052",
			func(o local.Options) bool {
				return o.Ports[local.PublisherGRPC] == 50052 && o.Ports[local.Publisher] == 8081
			},
		},
		"an empty variable is none": {
			"KAFKA_PORT", "",
			func(o local.Options) bool { return o.Ports[string(local.KafkaKind)] == 9092 },
		},
		"a word is no port":         {"INGRESS_PORT", "http", nil},
		"0 is no port":              {"INGRESS_PORT", "0", nil},
		"65536 is no port":          {"INGRESS_PORT", "65536", nil},
		"a negative one is no port": {"INGRESS_PORT", "-1", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(c.variable, c.value)
			o, err := fromEnvironment()
			switch {
			case c.ok == nil && (err == nil || !strings.Contains(err.Error(), c.variable)):
				t.Errorf("error %v", err)
			case c.ok != nil && (err != nil || !c.ok(o)):
				t.Errorf("options %+v, error %v", o, err)
			}
		})
	}
}
