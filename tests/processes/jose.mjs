// Verifies the tokens it is told, one a line, as a service with Node's jose does; says `ok KID` or what went wrong.
// node --input-type=module --eval "$(cat jose.mjs)" ISSUER HURRY
import { createInterface } from "node:readline";
import { createRemoteJWKSet, jwtVerify } from "jose";

const [issuer, hurry] = process.argv.slice(1);
const keys = createRemoteJWKSet(new URL(`${issuer}/.well-known/jwks.json`), {
  cooldownDuration: 30_000 / hurry,
  cacheMaxAge: 600_000 / hurry,
});

for await (const token of createInterface({ input: process.stdin })) {
  try {
    const { protectedHeader } = await jwtVerify(token, keys, {
      algorithms: ["RS256"],
      audience: "api",
      issuer,
      typ: "at+jwt",
    });
    console.log(`ok ${protectedHeader.kid}`);
  } catch (error) {
    console.log(`${error.code}: ${error.message}`);
  }
}
