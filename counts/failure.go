package counts

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"errors"
	"io"
	"strings"
	"syscall"

	"github.com/redis/go-redis/v9"
)

//go:embed rights.acl
var rightsFile string

// rights are what an ACL user needs.
var rights = strings.TrimSpace(rightsFile)

// replies are what a store answers that does not pass by itself, by the beginning of its error; in the advice, $ stands
// for the beginning of the variables' names.
var replies = []struct {
	prefix   string
	contents bool
	advice   string
}{
	{"NOAUTH", false, "the store wants a password: set $PASSWORD, and $USERNAME for an ACL user"},
	{"Protocol error: unauthenticated", false, "the store wants a password: set $PASSWORD, and $USERNAME for an ACL user"},
	{"WRONGPASS", false, "$PASSWORD is wrong, or $USERNAME"},
	{"NOPERM", false, "the store's ACL must give this user " + rights},
	{"ACL failure in script", false, "the store's ACL must give this user " + rights},
	{"WRONGTYPE", false, "something else has written to a key that the counts are in: rename or delete it"},
	{"NOTANUMBER", true, "something else has written there: set it to a number or delete it"},
	{"CROSSSLOT", false, "a cluster can't count in one step: use one primary with replicas"},
	{"MOVED", false, "a cluster can't count in one step: use one primary with replicas"},
	{"Unknown Redis command called from script", false, "the store is too old: Redis 7.0 and Valkey 7.2 are the oldest that will do"},
	{"unknown command", false, "the store is too old: Redis 7.0 and Valkey 7.2 are the oldest that will do"},
	{"Unexpected engine in script shebang", false, "the store is too old: Redis 7.0 and Valkey 7.2 are the oldest that will do"},
}

// failure returns the *Failure that err is to a caller, or nil.
func (s *server) failure(err error) error {
	if err == nil {
		return nil
	}
	f := &Failure{Err: err}
	for _, r := range replies {
		if redis.HasErrorPrefix(err, r.prefix) {
			f.Lasting, f.Contents, f.Advice = true, r.contents, r.advice
		}
	}
	var notTLS tls.RecordHeaderError
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case redis.IsOOMError(err):
		f.Advice = "the store's memory is full: give it more, or remember the ids for a shorter DEDUPE_WINDOW"
	case errors.As(err, &notTLS):
		f.Lasting, f.Advice = true, "the store speaks no TLS at this port: unset $TLS or give its TLS port"
	case errors.As(err, &unknown):
		f.Lasting, f.Advice = true, "$CA_FILE must hold the authority that has signed the store's certificate"
	case errors.As(err, &host):
		f.Lasting, f.Advice = true, "the store must be called by a name that its certificate holds"
	case errors.As(err, &invalid):
		f.Lasting, f.Advice = true, "the store's certificate must be renewed or replaced"
	case s.settings.SentinelMaster != "" && strings.Contains(err.Error(), "all sentinels"):
		f.Advice = "no Sentinel of $SENTINEL_ADDRS knows the master $SENTINEL_MASTER"
	case !s.settings.TLS && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)):
		f.Advice = "the store closed the connection; if it always does, it may want $TLS"
	case s.settings.TLS && errors.Is(err, context.DeadlineExceeded):
		f.Advice = "the store did not answer in time; if it never does, it may speak no TLS at this port: unset $TLS or give its TLS port"
	case errors.Is(err, context.DeadlineExceeded):
		f.Advice = "the store did not answer in time"
	}
	f.Advice = strings.ReplaceAll(f.Advice, "$", s.prefix)
	return f
}
