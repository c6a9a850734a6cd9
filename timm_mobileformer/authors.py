"""Locations and published accuracy of the authors' weights."""
__all__ = ['AUTHORS_FILES', 'AUTHORS_TAG', 'PAPER_TOP1']

AUTHORS_TAG = 'ms_in1k'  # pretrained tag of the authors' weights
AUTHORS_FILES = {  # IDs on Google Drive, from the README of AAboys/MobileFormer
    'mobileformer_26m': '15uWYzx2VWWUjacZQHB56vOHzKxQDlp5O',
    'mobileformer_52m': '1ekq_FPl57gjIlYX16Ll0nBuEyB0pjgGt',
    'mobileformer_96m': '1kMbRceswujtliCHKr-nxMFsrkvBrEfrW',
    'mobileformer_151m': '1w4QO-zhJ8QI1zGu7iOZ7lXxYJ5G1VXdF',
    'mobileformer_214m': '13MOjdIMMBJgqyq_ld-grRhBBHOFU5Ggd',
    'mobileformer_294m': '1JBSM7NJ60fN9TgT5sMnbhmbZwrzcBd0r',
    'mobileformer_508m': '1bqLIcpbCaxK-Eb4wcxk0iJpFJ1nXfGuF',
}
# Top-1 accuracy on ImageNet-1k in percent, as reported in the paper (arXiv 2108.05895).
PAPER_TOP1 = {
    'mobileformer_26m': 64.0,
    'mobileformer_52m': 68.7,
    'mobileformer_96m': 72.8,
    'mobileformer_151m': 75.2,
    'mobileformer_214m': 76.7,
    'mobileformer_294m': 77.9,
    'mobileformer_508m': 79.3,
}
