from gsm.noise import GaussianNoise
class SecureNoise(GaussianNoise): pass
