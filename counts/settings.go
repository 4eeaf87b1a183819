package counts

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"isobar.dev/internal/peer"
)

// Settings say where a store is and how to get in. The tags are completed by a prefix, like REDIS_.
type Settings struct {
	Addr     string `env:"ADDR"` // HOST:PORT
	Username string `env:"USERNAME"`
	Password string `env:"PASSWORD"`
	TLS      bool   `env:"TLS"`
	CAFile   string `env:"CA_FILE"` // PEM; the system's authorities without it
	// MinReplicas is how many replicas must have confirmed what is counted before Count returns. What has not reached a
	// replica is lost when it takes the primary's place.
	MinReplicas int `env:"MIN_REPLICAS"`
	// SentinelAddrs and SentinelMaster take the place of Addr: the primary is the one that these Sentinels tell.
	SentinelAddrs    []string `env:"SENTINEL_ADDRS"`
	SentinelMaster   string   `env:"SENTINEL_MASTER"`
	SentinelUsername string   `env:"SENTINEL_USERNAME"`
	SentinelPassword string   `env:"SENTINEL_PASSWORD"`
}

// poolSize is the most connections to the store; there are only as many as batches under way.
const poolSize = 64

func variablePrefix(store string) string { return strings.ToUpper(store) + "_" }

func (s *Settings) tls(prefix string) peer.TLS {
	return peer.TLS{Peer: "the store", Prefix: prefix, On: s.TLS, CAFile: s.CAFile}
}

// options checks the settings; its errors name the variables, which begin with prefix.
func (s *Settings) options(prefix string) (*redis.UniversalOptions, error) {
	wrong := func(variable, rule string, args ...any) error {
		return fmt.Errorf("%s%s %s", prefix, variable, fmt.Sprintf(rule, args...))
	}
	var addrs []string
	switch {
	case s.Addr == "" && len(s.SentinelAddrs) == 0:
		return nil, wrong("ADDR", "is not set: it must be HOST:PORT, or %[1]sSENTINEL_ADDRS and %[1]sSENTINEL_MASTER must be set", prefix)
	case s.Addr != "" && len(s.SentinelAddrs) > 0:
		return nil, wrong("ADDR", "must not be set beside %sSENTINEL_ADDRS: the Sentinels tell the address", prefix)
	case (s.SentinelMaster == "") != (len(s.SentinelAddrs) == 0):
		return nil, wrong("SENTINEL_MASTER", "and %sSENTINEL_ADDRS must be set together", prefix)
	case s.Addr != "":
		if err := peer.CheckAddr(s.Addr); err != nil {
			return nil, wrong("ADDR", "must be HOST:PORT: %v", err)
		}
		addrs = []string{s.Addr}
	default:
		for _, addr := range s.SentinelAddrs {
			if err := peer.CheckAddr(strings.TrimSpace(addr)); err != nil {
				return nil, wrong("SENTINEL_ADDRS", "must be HOST:PORT,HOST:PORT and so on: %v", err)
			}
			addrs = append(addrs, strings.TrimSpace(addr))
		}
	}
	switch {
	case s.Username != "" && s.Password == "":
		return nil, wrong("PASSWORD", "is not set, although %sUSERNAME is", prefix)
	case s.MinReplicas < 0:
		return nil, wrong("MIN_REPLICAS", "must not be below 0, like %d", s.MinReplicas)
	}
	secure := s.tls(prefix)
	if _, err := secure.Config(); err != nil {
		return nil, err
	}
	return &redis.UniversalOptions{
		Addrs:            addrs,
		MasterName:       s.SentinelMaster,
		Username:         s.Username,
		Password:         s.Password,
		SentinelUsername: s.SentinelUsername,
		SentinelPassword: s.SentinelPassword,
		Dialer: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return secure.Dial(ctx, addr, dialTimeout)
		},

		// A single retry is for a connection that broke while it was idle. Waiting any longer is the caller's, who is
		// told 503: then it is known that the store is away.
		MaxRetries:            1,
		DialerRetries:         1,
		DialTimeout:           dialTimeout,
		ReadTimeout:           answerTimeout,
		WriteTimeout:          answerTimeout,
		ContextTimeoutEnabled: true,

		Protocol:                 2, // none of RESP3 is used, so a proxy that lacks it does no harm
		PoolSize:                 poolSize,
		PipelinePoolSize:         -1,
		ConnMaxIdleTime:          5 * time.Minute,
		DisableIdentity:          true, // an ACL user need not be allowed to do it
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}, nil
}
