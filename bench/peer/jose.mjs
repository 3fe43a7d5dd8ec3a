// What verifying costs with Node's jose, told JWKS, TOKEN, ISSUER, AUDIENCE and SECONDS. It says as JSON the processor
// seconds of each turn's calls, turns of jose and of Node's own RSA one after the other. Processor time and not time on
// the wall, as in `frame`, and with it that of the threads that jose has WebCrypto work in.
import { createPublicKey, verify } from "node:crypto";
import { importJWK, jwtVerify } from "jose";

const [jwks, token, issuer, audience, seconds] = process.argv.slice(1);
const jwk = JSON.parse(jwks).keys[0];
const key = await importJWK(jwk, "RS256");
const raw = createPublicKey({ key: jwk, format: "jwk" });
const signed = Buffer.from(token.slice(0, token.lastIndexOf(".")));
const signature = Buffer.from(token.slice(token.lastIndexOf(".") + 1), "base64url");

const rules = { algorithms: ["RS256"], audience, issuer, typ: "at+jwt", requiredClaims: ["exp", "iat", "sub", "jti"] };
const contestants = {
  jose: () => jwtVerify(token, key, rules),
  raw: () => {
    if (!verify("RSA-SHA256", signed, raw, signature)) throw new Error("not the signature");
  },
};

const calls = 200;
const taken = { jose: [], raw: [] };
const end = Date.now() + seconds * 1000;
while (Date.now() < end) {
  for (const [name, run] of Object.entries(contestants)) {
    const before = process.cpuUsage();
    for (let call = 0; call < calls; call++) await run();
    const { user, system } = process.cpuUsage(before);
    taken[name].push((user + system) / 1e6 / calls);
  }
}
console.log(JSON.stringify(taken));
