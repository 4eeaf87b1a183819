// Package kafka holds what every client of Kafka here has in common, and sends with the broker's word that it has what was
// sent.
package kafka

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/IBM/sarama"
	"github.com/rcrowley/go-metrics"
	"github.com/xdg-go/scram"

	"isobar.dev/internal/peer"
)

// Settings say where Kafka is and how to get in.
type Settings struct {
	Brokers []string `env:"KAFKA_BOOTSTRAP_SERVERS,required,notEmpty"` // HOST:PORT, separated by commas
	TLS     bool     `env:"KAFKA_TLS"`
	CAFile  string   `env:"KAFKA_CA_FILE"` // PEM; the system's authorities without it
	// Username and Password log in by SASL with SCRAM-SHA-512. Without them nobody logs in.
	Username string `env:"KAFKA_USERNAME"`
	Password string `env:"KAFKA_PASSWORD"`
}

func (s Settings) tls() peer.TLS {
	return peer.TLS{Peer: "Kafka", Prefix: "KAFKA_", On: s.TLS, CAFile: s.CAFile}
}

// Config returns the configuration from which a client goes on. Its error names the variable that is wrong.
func (s Settings) Config() (*sarama.Config, error) {
	for _, addr := range s.Brokers {
		if err := peer.CheckAddr(addr); err != nil {
			return nil, fmt.Errorf("KAFKA_BOOTSTRAP_SERVERS must be HOST:PORT,HOST:PORT and so on: %w", err)
		}
	}
	if (s.Username == "") != (s.Password == "") {
		return nil, errors.New("KAFKA_USERNAME and KAFKA_PASSWORD must be set together")
	}
	config, err := s.tls().Config()
	if err != nil {
		return nil, err
	}
	c := sarama.NewConfig()
	c.ClientID = "isobar"
	c.Version = sarama.V3_0_0_0 // old enough for every broker that still gets fixes, new enough for all that is used
	c.Net.DialTimeout = 5 * time.Second
	c.Net.ReadTimeout = 15 * time.Second
	c.Net.WriteTimeout = 15 * time.Second
	c.Net.TLS.Enable, c.Net.TLS.Config = s.TLS, config
	if s.Username != "" {
		// Kafka takes names and passwords as they are, so they are not prepared as SASL would have it.
		client, err := scram.SHA512.NewClientUnprepped(s.Username, s.Password, "")
		if err != nil {
			return nil, err
		}
		c.Net.SASL.Enable, c.Net.SASL.Mechanism = true, sarama.SASLTypeSCRAMSHA512
		c.Net.SASL.User, c.Net.SASL.Password = s.Username, s.Password
		c.Net.SASL.SCRAMClientGeneratorFunc = func() sarama.SCRAMClient { return &login{client: client} }
	}
	c.Metadata.Retry.Max = 0 // who calls tries again, and says so
	c.Metadata.Timeout = 10 * time.Second
	c.Metadata.RefreshFrequency = time.Minute
	c.Metadata.AllowAutoTopicCreation = false
	return c, nil
}

// Explain returns an error of a client with what to do about it, where that is known.
func (s Settings) Explain(err error) error {
	anonymous := s.Username == ""
	switch {
	case errors.Is(err, sarama.ErrSASLAuthenticationFailed):
		return fmt.Errorf("%w: KAFKA_PASSWORD is wrong, or KAFKA_USERNAME", err)
	case !anonymous && errors.Is(err, sarama.ErrOutOfBrokers) && strings.HasSuffix(err.Error(), sarama.ErrOutOfBrokers.Error()):
		// sarama tells every reason but this one: that the broker does not begin a login.
		return fmt.Errorf("%w: Kafka may not offer SCRAM-SHA-512 at this port, or want no user: then unset KAFKA_USERNAME and KAFKA_PASSWORD", err)
	case anonymous && errors.Is(err, io.EOF):
		return fmt.Errorf("%w, or it may want KAFKA_USERNAME and KAFKA_PASSWORD", s.tls().Explain(err))
	}
	return s.tls().Explain(err)
}

// login is sarama's view of a login. The client is shared: it knows what it has derived from the password, which takes
// milliseconds.
type login struct {
	client *scram.Client
	*scram.ClientConversation
}

func (l *login) Begin(string, string, string) error {
	l.ClientConversation = l.client.NewConversation()
	return nil
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
