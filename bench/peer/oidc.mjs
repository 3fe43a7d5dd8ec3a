// node oidc-provider as a service of its own, told PORT, SESSIONS and FILE. It begins the sessions, writes their refresh
// tokens, a line each, and listens. A refresh rotates and signs as many RS256 tokens as ours: an access token and, where
// ours signs a refresh token, an ID token.
import { generateKeyPairSync } from "node:crypto";
import { writeFileSync } from "node:fs";
import { Provider } from "oidc-provider";

const [port, sessions, file] = process.argv.slice(1);
const client = "bench";
const api = "urn:example:api";
const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });

// The adapter that comes with it remembers a thousand things, and looks through all earlier tokens of a grant whenever
// it writes one. A map costs it nothing: the best case of any store.
class Memory {
  things = new Map();
  upsert = async (id, payload) => void this.things.set(id, payload);
  find = async (id) => this.things.get(id);
  consume = async (id) => void (this.things.get(id).consumed = Math.floor(Date.now() / 1000));
  destroy = async (id) => void this.things.delete(id);
  revokeByGrantId = async () => {};
}

const provider = new Provider(`http://localhost:${port}`, {
  adapter: Memory,
  jwks: { keys: [{ ...privateKey.export({ format: "jwk" }), alg: "RS256", use: "sig" }] },
  clients: [
    {
      client_id: client,
      token_endpoint_auth_method: "none",
      grant_types: ["authorization_code", "refresh_token"],
      redirect_uris: ["https://app.example.com/callback"],
    },
  ],
  cookies: { keys: ["nothing here has cookies"] },
  features: {
    devInteractions: { enabled: false },
    resourceIndicators: {
      enabled: true,
      useGrantedResource: () => true,
      getResourceServerInfo: () => ({
        scope: "orders:read orders:write",
        accessTokenFormat: "jwt",
        jwt: { sign: { alg: "RS256" } },
      }),
    },
  },
  findAccount: (_, accountId) => ({ accountId, claims: () => ({ sub: accountId }) }),
  rotateRefreshToken: true,
  routes: { token: "/token", jwks: "/jwks" },
  scopes: ["openid", "offline_access", "orders:read", "orders:write"],
  ttl: { AccessToken: 600, Grant: 1_209_600, IdToken: 600, RefreshToken: 1_209_600 },
});

async function begin(number) {
  const accountId = `user-${number}`;
  const grant = new provider.Grant({ accountId, clientId: client });
  grant.addOIDCScope("openid offline_access");
  grant.addResourceScope(api, "orders:read orders:write");
  return new provider.RefreshToken({
    accountId,
    amr: ["pwd"],
    authTime: Math.floor(Date.now() / 1000),
    client: await provider.Client.find(client),
    expiresWithSession: false,
    grantId: await grant.save(1_209_600),
    gty: "authorization_code",
    resource: api,
    scope: "openid offline_access orders:read orders:write",
  }).save();
}

const tokens = await Promise.all(Array.from({ length: Number(sessions) }, (_, number) => begin(number)));
writeFileSync(file, tokens.map((token) => `${token}\n`).join(""));
provider.listen(Number(port), "127.0.0.1");
