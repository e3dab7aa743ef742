// exp of a vector of floats, within 2 units in the last place.
#pragma once

namespace lapilli {
namespace {

// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and the Taylor polynomial of degree 7.
// Arguments are taken between -87 and 88, where the result is a normal number; NaN stays NaN.
template <class S>
inline typename S::F exponential(typename S::F x) {
  using F = typename S::F;
  x = S::max(S::fset(-87.0f), x);  // the second argument comes out where one is NaN
  x = S::sub(S::fset(0.0f), S::max(S::fset(-88.0f), S::sub(S::fset(0.0f), x)));
  const typename S::I n = S::nearest(S::mul(x, S::fset(1.44269504089f)));
  const F whole = S::to_float(n);
  F r = S::fma(whole, S::fset(-0.693359375f), x);
  r = S::fma(whole, S::fset(2.12194440e-4f), r);
  F sum = S::fset(1.0f / 5040);
  sum = S::fma(sum, r, S::fset(1.0f / 720));
  sum = S::fma(sum, r, S::fset(1.0f / 120));
  sum = S::fma(sum, r, S::fset(1.0f / 24));
  sum = S::fma(sum, r, S::fset(1.0f / 6));
  sum = S::fma(sum, r, S::fset(0.5f));
  sum = S::fma(sum, r, S::fset(1.0f));
  sum = S::fma(sum, r, S::fset(1.0f));
  return S::ldexp(sum, n);
}

}  // namespace
}  // namespace lapilli
