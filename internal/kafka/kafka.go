// Package kafka holds what every client of Kafka here has in common, and sends with the broker's word that it has what was
// sent.
package kafka

import (
	"log/slog"
	"time"

	"github.com/IBM/sarama"
	"github.com/rcrowley/go-metrics"
)

// Settings say where Kafka is.
type Settings struct {
	Brokers []string `env:"KAFKA_BOOTSTRAP_SERVERS,required,notEmpty"` // HOST:PORT, separated by commas
}

// Config returns the configuration from which a client goes on.
func (s Settings) Config() *sarama.Config {
	c := sarama.NewConfig()
	c.ClientID = "isobar"
	c.Version = sarama.V3_0_0_0 // old enough for every broker that still gets fixes, new enough for all that is used
	c.Net.DialTimeout = 5 * time.Second
	c.Net.ReadTimeout = 15 * time.Second
	c.Net.WriteTimeout = 15 * time.Second
	c.Metadata.Retry.Max = 0 // who calls tries again, and says so
	c.Metadata.Timeout = 10 * time.Second
	c.Metadata.RefreshFrequency = time.Minute
	c.Metadata.AllowAutoTopicCreation = false
	return c
}

func init() {
	sarama.Logger = discard{}
	metrics.UseNilMetrics = true // sarama keeps many, for each record and request, and nobody reads them
}

// discard keeps sarama's chatter out of the log at its usual level.
type discard struct{}

func (discard) Print(v ...any)                 { slog.Debug("sarama", "says", v) }
func (discard) Printf(format string, v ...any) { slog.Debug("sarama", "says", format, "values", v) }
func (discard) Println(v ...any)               { slog.Debug("sarama", "says", v) }
